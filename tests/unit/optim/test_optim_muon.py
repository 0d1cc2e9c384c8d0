"""The Muon family: against torch's own Muon, against the formulas written out, and what clips attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_replay.errors import ConfigError
from megatron_replay.optim import AdaMuon, AdamW, Muon, MuonClip, ObservedLogits, muon_groups
from megatron_replay.optim.muonclip import qk_factor
from megatron_replay.optim.newton_schulz import orthogonalised

SHAPES = [(12, 20), (30, 8), (16, 16)]


def draws(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=gen).to(dtype) for shape in SHAPES]


def run(opt: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    for seed in steps:
        for p, g in zip(params, draws(seed, params[0].dtype), strict=True):
            p.grad = g
        opt.step()


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torch_s(nesterov: bool) -> None:
    ours, theirs = ([torch.nn.Parameter(x) for x in draws(9)] for _ in range(2))
    run(Muon(ours, 0.01, nesterov=nesterov, ns_precision="bfloat16"), ours, range(6))
    reference = torch.optim.Muon(
        theirs, 0.01, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    run(reference, theirs, range(6))
    for a, b, start in zip(ours, theirs, draws(9), strict=True):
        # both round their products to bfloat16; a step is 0.01 x about 0.2
        torch.testing.assert_close(a - start, b - start, rtol=0.02, atol=2e-4)


def test_orthogonalised_has_singular_values_about_one() -> None:
    for matrix in draws(1, torch.float64):
        values = torch.linalg.svdvals(orthogonalised(matrix))
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    matrix = draws(1, torch.float64)[0]
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.cosine_similarity(orthogonalised(matrix).flatten(), (u @ vt).flatten(), dim=0) > 0.97
    torch.testing.assert_close(orthogonalised(matrix), orthogonalised(matrix.T).T)
    assert not orthogonalised(torch.zeros(3, 4)).any()


def test_the_scale_is_adamw_s() -> None:
    """0.2 sqrt(max(rows, cols)) makes the rms of the direction about 0.2 for every shape."""
    params = [torch.nn.Parameter(x) for x in draws(9)]
    opt = Muon(params, 0.01)
    run(opt, params, range(2))
    assert opt.metrics["muon/update_rms"] == pytest.approx(0.2, rel=0.2)


def test_adamuon_is_the_method_written_out() -> None:
    params = [torch.nn.Parameter(x) for x in draws(9, torch.float64)]
    theta = draws(9, torch.float64)
    m, v = [torch.zeros_like(x) for x in theta], [torch.zeros_like(x) for x in theta]
    run(AdaMuon(params, 0.02), params, range(5))
    for seed in range(5):
        for i, g in enumerate(draws(seed, torch.float64)):
            m[i] = 0.95 * m[i] + 0.05 * g
            o = orthogonalised((0.05 * g + 0.95 * m[i]).sign())
            v[i] = 0.95 * v[i] + 0.05 * o**2
            scaled = o / (v[i].sqrt() + 1e-8)
            theta[i] = theta[i] * (1 - 0.02 * 0.1) - 0.02 * 0.2 * math.sqrt(o.numel()) / float(scaled.norm()) * scaled
    for ours, naive in zip(params, theta, strict=True):
        torch.testing.assert_close(ours.detach(), naive, rtol=1e-9, atol=1e-10)


def test_what_is_no_hidden_matrix_gets_adamw() -> None:
    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = torch.nn.Embedding(7, 4)
            self.layer = torch.nn.Linear(4, 4)
            self.lm_head = torch.nn.Linear(4, 7, bias=False)

    ours, theirs = Tiny(), Tiny()
    for model, opt in ((ours, Muon(muon_groups(ours), 0.1)), (theirs, AdamW(theirs.parameters(), 0.1))):
        model.lm_head(model.layer(model.embed(torch.arange(7)))).square().sum().backward()
        opt.step()
    same = {name: torch.equal(p, q) for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True)}
    assert same == {"embed.weight": True, "layer.weight": False, "layer.bias": True, "lm_head.weight": True}


def test_matrices_keep_one_state_tensor() -> None:
    params = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(5))]
    for make, keys in ((Muon, {"exp_avg"}), (AdaMuon, {"exp_avg", "exp_avg_sq"})):
        opt = make(params, 0.1)
        opt.init_state()
        assert set(opt.state[params[0]]) == keys and set(opt.state[params[1]]) == {"exp_avg", "exp_avg_sq"}


def test_qk_factor() -> None:
    torch.testing.assert_close(qk_factor(torch.tensor([400.0, 100.0, -5.0]), 100.0), torch.tensor([0.5, 1.0, 1.0]))


def logits(q: Tensor, k: Tensor, x: Tensor, kv_heads: int, dim: int) -> Tensor:
    """Largest scaled logit of each query head, [heads]; no mask."""
    queries, keys = (x @ q.T).view(len(x), -1, dim), (x @ k.T).view(len(x), kv_heads, dim)
    keys = keys.repeat_interleave(queries.shape[1] // kv_heads, 1)
    return torch.einsum("ihd,jhd->hij", queries, keys).amax((1, 2)) / math.sqrt(dim)


def test_qk_clip_takes_each_head_to_the_threshold() -> None:
    torch.manual_seed(0)
    dim, kv_heads = 4, 2
    q, k, x = torch.nn.Parameter(torch.randn(16, 8) * 3), torch.nn.Parameter(torch.randn(8, 8) * 3), torch.randn(10, 8)
    watched = ObservedLogits([(q, k)], kv_heads)
    opt = MuonClip([q, k], 0.0, threshold=20.0, logits=watched)
    before = logits(q, k, x, kv_heads, dim)
    assert bool((before > 20).any())
    watched.observe(0, before.detach())
    q.grad, k.grad = torch.randn_like(q), torch.randn_like(k)
    opt.step()
    after = logits(q, k, x, kv_heads, dim).view(kv_heads, -1).amax(1)
    torch.testing.assert_close(after, before.view(kv_heads, -1).amax(1).clamp(max=20.0), rtol=1e-5, atol=1e-5)
    unchanged = q.detach().clone()
    opt.step()  # nothing was observed since
    assert torch.equal(q, unchanged)


def test_a_norm_after_the_projection_is_what_shrinks() -> None:
    q_norm, k_norm = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.full((4,), 2.0))
    watched = ObservedLogits([(q_norm, k_norm)], 2)
    opt = MuonClip([q_norm, k_norm], 0.0, threshold=1.0, logits=watched)
    watched.observe(0, torch.tensor([4.0, 1.0, 0.5, 2.0]))
    q_norm.grad = k_norm.grad = torch.ones(4)
    opt.step()
    assert torch.equal(q_norm, torch.full((4,), 0.5)) and torch.equal(k_norm, torch.ones(4))


def test_the_paper_s_variant_clips_attention_by_itself() -> None:
    def params() -> list[torch.nn.Parameter]:
        return [
            torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64)),
            torch.nn.Parameter(torch.ones(3, dtype=torch.float64)),
        ]

    ours = params()
    groups = [{"params": ours[:1], "kind": "attention"}, {"params": ours[1:]}]
    opt = MuonClip(groups, 0.1, variant="paper", clip_grad=1.0)
    grads = [torch.full((2, 2), 50.0, dtype=torch.float64), torch.full((3,), 0.1, dtype=torch.float64)]
    for p, g in zip(ours, grads, strict=True):
        p.grad = g
    opt.step()
    # attention's norm is 100, so its gradient shrinks a hundredfold; the other's 0.17 is left alone
    torch.testing.assert_close(opt.state[ours[0]]["exp_avg"], 0.05 * grads[0] / 100, rtol=1e-6, atol=0)
    torch.testing.assert_close(opt.state[ours[1]]["exp_avg"], 0.1 * grads[1], rtol=1e-12, atol=0)
    assert opt.metrics["muonclip/attention_norm"] == pytest.approx(100)


def test_what_cannot_work_is_told_before_anything_moves() -> None:
    param = torch.nn.Parameter(torch.ones(2, 2))
    param.grad = torch.ones(2, 2)
    for options, message in (({}, "must know the attention logits"), ({"variant": "paper"}, "kind='attention'")):
        with pytest.raises(ConfigError, match=message):
            MuonClip([param], 0.1, **options).step()  # type: ignore[arg-type]
        assert torch.equal(param, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "momentum must be below 1"),
        ({"ns_steps": 0}, "ns_steps must be at least 1"),
        ({"ns_precision": "fp8"}, "ns_precision 'fp8'"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Muon([torch.nn.Parameter(torch.ones(2, 2))], 0.1, **options)  # type: ignore[arg-type]


def test_a_group_of_unknown_kind() -> None:
    param = torch.nn.Parameter(torch.ones(2, 2))
    param.grad = torch.ones(2, 2)
    with pytest.raises(ConfigError, match="did you mean 'embedding'"):
        Muon([{"params": [param], "kind": "embeding"}], 0.1).step()
