"""The operators on a device without float64 (an NPU): the same, with float32 sums where the device adds up."""

from __future__ import annotations

import pytest
import torch

from megatron_replay.kernels import torch_twins
from megatron_replay.ops import CandidateSets, VocabShard, dynamic_topk, restricted_linear_cross_entropy, topk


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (torch_twins, topk):
        monkeypatch.setattr(module, "has_float64", lambda device: False)


def some_sets() -> CandidateSets:
    return CandidateSets.from_lists([[1, 2, 3], [4], [5, 29], [0, 7, 8, 9]], [2, 4, 29, 0])


def test_the_same_loss_and_gradients(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 8), torch.randn(30, 8)

    def run() -> list[torch.Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        sets = some_sets()
        soft = sets.local(VocabShard(0, 30), targets=torch.linspace(0.1, 1, len(sets.ids)))
        loss = torch.cat([restricted_linear_cross_entropy(h, w, some, kernels="reference") for some in (sets, soft)])
        loss.sum().backward()
        assert h.grad is not None and w.grad is not None
        return [loss.detach(), h.grad, w.grad]

    truth = run()
    request.getfixturevalue("without_float64")
    for ours, theirs in zip(run(), truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_positions_without_a_candidate_here(without_float64: None) -> None:
    offsets, z = torch.tensor([0, 0, 2, 2]), torch.tensor([1.0, 3.0])
    top, total, gold = torch_twins.set_stats(z, offsets, torch.tensor([-1, 1, -1]))
    assert top.tolist() == pytest.approx([torch_twins.EMPTY, 3.0, torch_twins.EMPTY])
    assert total.tolist() == pytest.approx([0.0, 1 + torch.exp(torch.tensor(-2.0)).item(), 0.0]) and gold.tolist() == [
        0.0,
        3.0,
        0.0,
    ]


def test_the_same_sets(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(1)
    logits, gold = torch.randn(40, 200) * 3, torch.randint(0, 200, (40,))
    truth = dynamic_topk(logits, gold, 0.9, 50, kernels="reference")
    request.getfixturevalue("without_float64")
    found = dynamic_topk(logits, gold, 0.9, 50, kernels="reference")
    assert torch.equal(found.ids, truth.ids) and torch.equal(found.offsets, truth.offsets)
    torch.testing.assert_close(found.lse, truth.lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("row", "lse"),
    [([float("nan"), 1.0], float("nan")), ([torch.inf, 1.0], float("nan")), ([-torch.inf] * 2, -torch.inf)],
)
def test_rows_that_cannot_be_used(row: list[float], lse: float, without_float64: None) -> None:
    found = torch_twins._lse(torch.tensor([row]))
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx([lse], nan_ok=True)
