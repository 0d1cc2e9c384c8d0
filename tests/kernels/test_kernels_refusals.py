"""The compiled operators refuse wrong arguments with an error, whoever calls them, and never crash.

Such arguments have a wrong dtype, shape, bound or stride.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_replay.kernels.library import NAMESPACE

pytestmark = pytest.mark.usefixtures("compiled")
OPS = getattr(torch.ops, NAMESPACE)
N, H, V = 3, 5, 7
HIDDEN, WEIGHT = torch.ones(N, H), torch.ones(V, H)
OFFSETS, COLUMNS, GOLD = (
    torch.tensor([0, 2, 2, 4]),
    torch.tensor([1, 6, 0, 2], dtype=torch.int32),
    torch.tensor([1, -1, 2]),
)
FACTORS, SCALE = torch.ones(4), torch.ones(2, N)
TOUCHED, BEGINS, TOKENS = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 6], [0, 1, 3, 4], [2, 0, 2, 0]))
LOGITS, SCALARS_OF_SETS = torch.ones(N, V), torch.ones(3, N)
OUTSIDE = [torch.tensor([0, 7, 0, 0], dtype=torch.int32), torch.tensor([0, -1, 0, 0], dtype=torch.int32)]
ENTRIES = (HIDDEN, TOUCHED, BEGINS, TOKENS, FACTORS)
SCALARS = torch.ones(1, 11, dtype=torch.float64)


def dh(**changed: object) -> Callable[[], object]:
    given = {"mixture": torch.ones(N, H), "weight": WEIGHT, "columns": COLUMNS, "gold": GOLD, "scale": SCALE, **changed}
    return lambda: OPS.restricted_bwd_dh(*given.values())


def gradient(**changed: object) -> list[Callable[[], object]]:
    """Both operators of the weight's gradient."""
    given = dict(zip(("hidden", "touched", "begins", "tokens", "coefficient"), ENTRIES, strict=True)) | changed
    return [
        lambda: OPS.restricted_bwd_dw(*given.values(), torch.ones(V, H)),
        lambda: OPS.restricted_bwd_rows(*given.values()),
    ]


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def logits(**changed: object) -> list[Callable[[], object]]:
    """Both operators of the loss from logits."""
    given = {"matrix": LOGITS, "offsets": OFFSETS, "columns": COLUMNS, "gold": GOLD, "targets": None, **changed}
    matrix, *table, targets = given.values()
    return [
        lambda: OPS.restricted_logits_fwd(matrix, *table, targets),
        lambda: OPS.restricted_logits_bwd(FACTORS, *table, SCALARS_OF_SETS, matrix, targets),
    ]


def into_logits(**changed: object) -> Callable[[], object]:
    given = {"z": FACTORS, "offsets": OFFSETS, "columns": COLUMNS, "gold": GOLD, "scalars": SCALARS_OF_SETS, **changed}
    return lambda: OPS.restricted_logits_bwd(*given.values(), LOGITS.clone())


def update(**changed: object) -> Callable[[], object]:
    lists = {name: [torch.ones(4)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")} | {"rounded": []}
    return lambda: OPS.adam_update(*{**lists, "scalars": SCALARS, **changed}.values())


REFUSED: dict[str, list[Callable[[], object]]] = {
    "mixture must be contiguous": [
        dh(mixture=torch.ones(N, H + 1)),
        dh(mixture=torch.ones(H, N).t()),
        dh(mixture=torch.ones(N, H, dtype=torch.float64)),
    ],
    "target_mixture must be contiguous": [
        dh(target_mixture=torch.ones(N, H + 1)),
        dh(target_mixture=torch.ones(H, N).t()),
        dh(target_mixture=torch.ones(N, H, dtype=torch.float64)),
    ],
    "targets must be contiguous .4. Float": [
        call
        for wrong in (FACTORS[:3], FACTORS.double(), FACTORS[:, None], torch.ones(8)[::2], torch.ones(4).bfloat16())
        for call in logits(targets=wrong)
    ],
    "scale must be contiguous": [
        dh(scale=torch.ones(2, N - 1)),
        dh(scale=torch.ones(N, 2).t()),
        dh(scale=SCALE.double()),
    ],
    "gold of position 0 points outside": [
        dh(gold=torch.tensor([4, 0, 0])),
        dh(gold=torch.tensor([-2, 0, 0])),
        *logits(gold=torch.tensor([4, -1, 2])),
        *logits(gold=torch.tensor([-2, -1, 2])),
        *logits(gold=torch.tensor([2, -1, 2])),
    ],
    "gold of position 1 points outside its set": [
        *logits(gold=torch.tensor([0, 2, 2])),
        *logits(gold=torch.tensor([0, 0, 2])),
    ],
    "gold must be contiguous": [
        dh(gold=GOLD.int()),
        dh(gold=GOLD[:2]),
        dh(gold=torch.tensor([0, 0, 0, 0, 0, 0])[::2]),
        *logits(gold=GOLD.int()),
        *logits(gold=GOLD[:2]),
        *logits(gold=torch.tensor([0, 0, 0, 0, 0, 0])[::2]),
    ],
    "columns must be contiguous": [
        dh(columns=COLUMNS.long()),
        dh(columns=COLUMNS.repeat(2)[::2]),
        *logits(columns=COLUMNS.long()),
        *logits(columns=COLUMNS.repeat(2)[::2]),
    ],
    "a column lies outside the 7 columns of the logits": [*logits(columns=OUTSIDE[0]), *logits(columns=OUTSIDE[1])],
    "touched must be contiguous": [*gradient(touched=TOUCHED.long()), *gradient(touched=TOUCHED.repeat(2)[::2])],
    "begins must be contiguous": [*gradient(begins=BEGINS.long()), *gradient(begins=BEGINS.repeat(2)[::2])],
    "tokens must be contiguous": [*gradient(tokens=TOKENS.long()), *gradient(tokens=TOKENS.repeat(2)[::2])],
    "a column lies outside the 7 rows": [
        dh(columns=torch.tensor([0, 7, 0, 0], dtype=torch.int32)),
        dh(columns=torch.tensor([0, -1, 0, 0], dtype=torch.int32)),
    ],
    "touched rows must ascend within the 7 rows": gradient(touched=ints(0, 2, 7))[:1],
    "touched rows must ascend": [
        *gradient(touched=ints(0, 6, 2)),
        *gradient(touched=ints(2, 2, 6)),
        *gradient(touched=ints(-1, 2, 6)),
    ],
    "begins must be \\[4\\]": gradient(begins=BEGINS[:3]),
    "begins must rise from 0 to the 4 entries": [
        *gradient(begins=ints(0, 3, 2, 4)),
        *gradient(begins=ints(0, 1, 1, 4)),
        *gradient(begins=ints(0, 1, 3, 5)),
        *gradient(begins=ints(-1, 1, 3, 4)),
    ],
    "position lies outside the 3 hidden states": [
        *gradient(tokens=ints(2, 0, 3, 0)),
        *gradient(tokens=ints(2, 0, -1, 0)),
    ],
    "position lies outside the 2 hidden states": gradient(hidden=HIDDEN[:2]),
    "offsets must rise from 0 to the 4 columns": [
        *logits(offsets=torch.tensor([0, 3, 2, 4])),
        *logits(offsets=torch.tensor([0, 2, 2, 5])),
        *logits(offsets=torch.tensor([-1, 2, 2, 4])),
    ],
    "offsets must be contiguous": [
        *logits(offsets=OFFSETS.int()),
        *logits(offsets=OFFSETS.repeat(2)[::2]),
    ],
    "sets for 2 rows of logits": logits(matrix=LOGITS[:2]),
    "z must be contiguous": [
        into_logits(z=FACTORS[:3]),
        into_logits(z=FACTORS.double()),
        into_logits(z=torch.ones(8)[::2]),
    ],
    "scalars must be contiguous .3, 3. Float": [
        into_logits(scalars=SCALARS_OF_SETS[:2]),
        into_logits(scalars=SCALARS_OF_SETS.t()),
        into_logits(scalars=SCALARS_OF_SETS.double()),
    ],
    "coefficient must be": [*gradient(coefficient=FACTORS[:3]), *gradient(coefficient=FACTORS.double())],
    "compiled for float32": [dh(weight=WEIGHT.half()), *gradient(hidden=HIDDEN.half()), *logits(matrix=LOGITS.half())],
    "must be a matrix": [
        dh(weight=WEIGHT[0]),
        *gradient(hidden=HIDDEN[0]),
        lambda: OPS.restricted_bwd_dw(*ENTRIES, torch.ones(V)),
        *logits(matrix=LOGITS[0]),
    ],
    "grad_weight is": [lambda: OPS.restricted_bwd_dw(*ENTRIES, torch.ones(V, H + 1))],
    "1 gradients and 2 momenta": [lambda: OPS.optimizer_sums([HIDDEN], [None, None])],
    "gradients of": [lambda: OPS.optimizer_sums([HIDDEN.half()], [None])],
    "gradient 0 is not contiguous": [lambda: OPS.optimizer_sums([HIDDEN.t()], [None])],
    "momentum 0 must be contiguous": [
        lambda: OPS.optimizer_sums([HIDDEN], [HIDDEN[:2]]),
        lambda: OPS.optimizer_sums([HIDDEN], [HIDDEN.double()]),
        lambda: OPS.optimizer_sums([HIDDEN], [torch.ones(H, N).t()]),
    ],
    "parameters and gradients are float32 or bfloat16": [
        update(params=[torch.ones(4).double()]),
        update(grads=[torch.ones(4).half()]),
    ],
    "parameters and gradients must be contiguous and of one size": [
        update(grads=[torch.ones(3)]),
        update(params=[torch.ones(8)[::2]]),
    ],
    "must be contiguous float32 of the parameter's size": [
        update(exp_avgs=[torch.ones(3)]),
        update(exp_avg_sqs=[torch.ones(4).bfloat16()]),
        update(exp_avgs=[torch.ones(8)[::2]]),
    ],
    "rounded copies are contiguous bfloat16": [
        update(rounded=[torch.ones(4)]),
        update(rounded=[torch.ones(3).bfloat16()]),
    ],
    "lists of different lengths": [update(grads=[]), update(rounded=[torch.ones(4).bfloat16()] * 2)],
    "scalars must be": [
        update(scalars=SCALARS[:, :10]),
        update(scalars=SCALARS.float()),
        update(scalars=SCALARS.expand(2, 11)),
    ],
}


@pytest.mark.parametrize("match", REFUSED)
def test_what_does_not_fit_is_an_error(match: str) -> None:
    for call in REFUSED[match]:
        with pytest.raises(RuntimeError, match=match):
            call()
