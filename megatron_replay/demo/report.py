"""The demo's last output: what it learnt and forgot, the time it took, and the commands that repeat each phase."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_replay import __version__
from megatron_replay.demo.picture import Bars, draw
from megatron_replay.scoring import Proportion
from megatron_replay.scoring.table import compare, show


class Clock:
    """Wall and processor seconds of each phase, including those of its ranks."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        print(f"\n== {phase}", flush=True)
        began, used = time.perf_counter(), _processor_seconds()
        yield
        self.seconds[phase] = round(time.perf_counter() - began, 2)
        self.processor[phase] = round(_processor_seconds() - used, 2)


def report(out: Path, clock: Clock, ranks: int, about: str, commands: Sequence[str]) -> None:
    """Print the tables, and write demo.png and result.json into `out`, from the files that are there.

    Those are before.json, after.json and metrics.jsonl.
    """
    before, after = (json.loads((out / name).read_text(encoding="utf-8")) for name in ("before.json", "after.json"))
    losses = read_losses(out / "metrics.jsonl")
    draw(
        out / "demo.png",
        losses,
        bars(before, after),
        title=f"{about}, {len(losses)} steps: Logits Replay + MoClip on {ranks} ranks",
    )
    peak = peak_memory(ranks)
    result = {
        "version": __version__,
        "ranks": ranks,
        "seconds": clock.seconds,
        "processor_seconds": clock.processor,
        "peak_bytes": peak,
        "before": before,
        "after": after,
        "losses": losses,
        "commands": list(commands),
    }
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print()
    compare(measures(before), measures(after), about)
    print()
    seconds = {phase: f"{took:.0f} s" for phase, took in clock.seconds.items()}
    show(
        {**seconds, "all": f"{sum(clock.seconds.values()):.0f} s", "memory, at most": f"{peak / 2**30:.1f} GiB"},
        "what it took",
    )
    print(
        f"\npicture: {out / 'demo.png'}\nnumbers: {out / 'result.json'}; everything else beside it\nthe same by hand:"
    )
    print("\n".join(f"  {command}" for command in commands), flush=True)


def measures(result: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of the demo's table, from the results of `evaluate`."""
    return {
        "held-out databases: NLL of a SQL token": result["targets"]["nll"],
        "held-out databases: right answers": Proportion(**result["nl2sql"]["execution"]),
        "held-out databases: the very query": Proportion(**result["nl2sql"]["exact"]),
        "general text: perplexity": result["text"]["perplexity"],
        "distance from the base (relative L2)": result["base"]["relative_l2"],
    }


def bars(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Bars]:
    """The picture's measures: two of the gain, one of the loss."""
    right = [100 * result["nl2sql"]["execution"]["value"] for result in (before, after)]
    return [
        Bars("held-out databases:\nNLL of the SQL", before["targets"]["nll"], after["targets"]["nll"]),
        Bars("held-out databases:\nright answers", right[0], right[1], form="{:.0f} %", better="higher"),
        Bars("general text:\nperplexity", before["text"]["perplexity"], after["text"]["perplexity"], form="{:.1f}"),
    ]


def read_losses(metrics: Path) -> list[float]:
    """The training loss of each step."""
    return [json.loads(line)["lm loss"] for line in metrics.read_text(encoding="utf-8").splitlines()]


def peak_memory(ranks: int) -> int:
    """The bytes that this process and its ranks held at once, at most.

    Every rank counts like the largest one, shared pages included.
    """
    here, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (here + ranks * child) * 1024


def _processor_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
