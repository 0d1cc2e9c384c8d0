"""The kernels together are the restricted loss: two ranks that share the vocabulary, the two reductions between the
kernels by hand."""

from __future__ import annotations

import pytest
import torch
from cases import Sets, close, logits_bwd, logits_fwd, restricted_bwd_dh, restricted_bwd_dw, restricted_fwd
from stand_in import Library

from megatron_replay.kernels.torch_twins import row_of
from megatron_replay.ops import CandidateSets, VocabShard, restricted_linear_cross_entropy

VOCAB, CUT, WIDTH = 300, 130, 96


def ranks(hidden: torch.Tensor, weight: torch.Tensor, sets: CandidateSets) -> list[Sets]:
    """The part of the problem that each of two ranks holds.

    The third position has candidates on the second rank only, the fourth on the first only.
    """
    parts = []
    for start, stop in ((0, CUT), (CUT, VOCAB)):
        here = sets.local(VocabShard(start, stop, group=object()))  # type: ignore[arg-type]
        parts.append(Sets(hidden, weight[start:stop].clone(), here.offsets, here.columns, here.gold))
    return parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_ranks(kernels: Library, dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(11)
    ids = [sorted(torch.randperm(VOCAB, generator=gen)[:size].tolist()) for size in (40, 200, 1, 1, 90)]
    ids[2], ids[3] = [CUT, CUT + 5], [3, 70]
    sets = CandidateSets.from_lists(ids, [ids[0][5], ids[1][-1], CUT, 70, ids[4][0]])
    hidden, weight = (torch.randn(n, WIDTH, generator=gen).to(dtype) for n in (len(ids), VOCAB))
    weight = weight / 4
    grad = torch.linspace(0.5, 1, len(ids))

    exact_h, exact_w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    wanted = restricted_linear_cross_entropy(exact_h, exact_w, sets, kernels="reference")
    wanted_h, wanted_w = torch.autograd.grad((wanted * grad).sum(), (exact_h, exact_w))

    here = ranks(hidden, weight, sets)
    forward = [restricted_fwd(kernels, x) for x in here]
    tops, totals, golds = zip(*(stats.unbind() for _, stats, _ in forward), strict=True)
    peak = torch.maximum(*tops)  # all-reduce MAX
    total = sum(s * (m - peak).exp() for s, m in zip(totals, tops, strict=True))  # all-reduce SUM
    loss = total.log() + peak - sum(golds)
    assert close(loss, wanted.detach().float(), 3e-6)

    found_h, found_w = torch.zeros(len(ids), WIDTH), torch.zeros(VOCAB, WIDTH)
    for x, (z, stats, mixture), rows in zip(here, forward, (slice(0, CUT), slice(CUT, VOCAB)), strict=True):
        scale = torch.stack([(stats[0] - peak).exp() * grad / total, grad])
        found_h += restricted_bwd_dh(kernels, x, mixture, scale)[0]
        scalars = torch.stack([peak, grad / total, grad])
        dz = logits_bwd(kernels, z, x, scalars, torch.float32)[0]
        coefficient = dz[row_of(x.offsets, len(z)), x.columns.long()]
        found_w[rows] = restricted_bwd_dw(kernels, x, coefficient, torch.zeros(x.weight.shape))[0]
    assert close(found_h, wanted_h.float(), 3e-6) and close(found_w, wanted_w.float(), 3e-6)

    # from logits that are there already
    for x, (z, stats, _) in zip(here, forward, strict=True):
        logits = torch.zeros(len(ids), x.weight.shape[0])
        logits[row_of(x.offsets, len(z)), x.columns.long()] = z
        again, again_stats = logits_fwd(kernels, logits, x)
        assert torch.equal(again, z) and close(again_stats, stats, 1e-6)
