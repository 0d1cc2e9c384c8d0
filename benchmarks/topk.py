"""Time Stage 0's selection against softmax + topk + cumsum, in one interleaved run.

    python benchmarks/run.py topk --output benchmarks/results/topk.csv

The input is float32 logits of a synthetic language model, with tau 0.95 and k_max 200. `ratio` is to ours, of the
minima. The plain way with float32 sums is neither exact nor reproducible; with float64 sums it is, but for ties.
"""

from __future__ import annotations

import torch
from rows import Step, interleaved, language_logits, options, summary, write
from torch import Tensor

from megatron_replay.kernels.library import choose
from megatron_replay.ops import dynamic_topk

OURS = "ours, sets"


def plain(logits: Tensor, dtype: torch.dtype) -> Tensor:
    p, _ = logits.to(dtype).softmax(1).topk(200)
    return (p.cumsum(1) < 0.95).sum(1)


def methods(logits: Tensor, gold: Tensor) -> dict[str, Step]:
    ours, reference = choose().topk_rows, choose("reference").topk_rows
    return {
        OURS: lambda: dynamic_topk(logits, gold),
        "ours, the kernel alone": lambda: ours(logits, 200),
        "plain torch, the kernel's twin": lambda: reference(logits, 200),
        "plain torch, sets": lambda: dynamic_topk(logits, gold, kernels="reference"),
        "softmax + topk + cumsum": lambda: plain(logits, torch.float32),
        "softmax + topk + cumsum in float64": lambda: plain(logits, torch.float64),
        "topk alone": lambda: logits.topk(200),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--vocab", type=int, nargs="+", default=[151_936, 49_152])
    parser.add_argument("--rows", type=int, default=128)
    args = parser.parse_args()
    table = []
    for vocab in args.vocab:
        logits = torch.cat(list(language_logits(args.rows, vocab)))
        steps = methods(logits, logits.argmax(1))
        found = interleaved(steps, dict.fromkeys(steps, args.rounds), args.threads)
        for name, seconds in found.items():
            per_row = {"min_ms_a_row": f"{min(seconds) / args.rows * 1e3:.4f}"}
            ratio = f"{min(seconds) / min(found[OURS]):.3g}"
            table.append(
                {
                    "method": name,
                    "V": vocab,
                    "rows": args.rows,
                    "threads": args.threads,
                    **summary(seconds),
                    **per_row,
                    "ratio": ratio,
                }
            )
    write(table, "topk", args.output)


if __name__ == "__main__":
    main()
