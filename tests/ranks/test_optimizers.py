"""Every optimizer, sharded every way, is the optimizer on one process; whole matrices are taken apart and put together
exactly."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from jobs import LR, Job, opened, run, same
from models import LLAMA, QWEN3, write_folder
from optimizer_cases import Case, further, registered
from pool import fresh
from torch import Tensor

from megatron_replay.config import Optimizer
from megatron_replay.optim.muonclip import MuonClip
from megatron_replay.parallel.mcore.optimizer import kind_of
from megatron_replay.parallel.mcore.qk_clip import largest_logits
from megatron_replay.parallel.trainer import make_trainer

CASES = {
    **registered(LR),
    **further(LR),
    "muonclip-paper": Case(name="muonclip", lr=LR, options={"variant": "paper"}),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def settings(name: str, **options: Any) -> Optimizer:
    return Optimizer(name=name, lr=LR, weight_decay=0.1, clip_grad=1.0, options=options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Qwen3: norms after the query and key projections, tied; Llama: none, untied."""
    configs = {
        "qwen3": {**QWEN3, "num_hidden_layers": 2, "tie_word_embeddings": True},
        "llama": {**LLAMA, "num_hidden_layers": 2, "tie_word_embeddings": False},
    }
    return {name: str(write_folder(tmp_path_factory.mktemp(name), config)) for name, config in configs.items()}


@pytest.mark.matrix(4)
@every
@pytest.mark.parametrize("model", ["qwen3", "llama"])
def test_tensor_and_pipeline_ranks_change_nothing(folders: dict[str, str], case: Case, model: str) -> None:
    """In float64: a sign or a threshold turns a rounding error of float32 into a whole step of one weight."""
    job = Job(folder=folders[model], steps=4, dtype=torch.float64, optimizer=case.config)
    truth = run(job)
    layouts = {
        "qwen3": [{"tensor": 2, "pipeline": 2}, {"tensor": 2, "replicas": 2, "sequence_parallel": True}],
        "llama": [{"tensor": 3}],
    }
    for layout in layouts[model]:
        same(run(job.on(**layout)), truth, 1e-9)


@pytest.mark.matrix(3)
@every
def test_sharding_the_state_changes_no_bit(folders: dict[str, str], case: Case) -> None:
    """Two replicas add the same two gradients with and without ZeRO-1, so what follows must be the same bits."""
    job = Job(folder=folders["llama"], steps=4, optimizer=case.config)
    sharded, plain = run(job.on(replicas=2)), run(job.on(replicas=2, zero1=False))
    assert all(torch.equal(sharded.weights[name], plain.weights[name]) for name in plain.weights)
    assert [step.metrics for step in sharded.steps] == [pytest.approx(step.metrics, rel=1e-12) for step in plain.steps]


@pytest.mark.parametrize("case", [pytest.param(case, id=id) for id, case in CASES.items() if id != "adamw"])
def test_the_optimizers_differ_from_adamw(folders: dict[str, str], case: Case) -> None:
    """So that the comparisons above are of the rules they name."""
    job = Job(folder=folders["llama"], steps=3, optimizer=case.config)
    adamw = run(dataclasses.replace(job, optimizer=settings("adamw")))
    ours = run(job)
    assert any(not torch.equal(ours.weights[name], adamw.weights[name]) for name in adamw.weights)


def test_an_option_reaches_the_optimizer_inside_megatron_s_wrapper(folders: dict[str, str]) -> None:
    """megatron's own groups carry AdamW's settings, which must not go before ours."""
    job = Job(folder=folders["llama"], steps=2, optimizer=settings("adamw", eps=1.0))
    wide, usual = run(job), run(dataclasses.replace(job, optimizer=settings("adamw")))
    assert wide.steps[1].metrics["optimizer/update_rms"] < 0.1 < 0.5 < usual.steps[1].metrics["optimizer/update_rms"]


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "pipeline": 2}], ids=str)
def test_norms_do_not_decay(folders: dict[str, str], layout: dict[str, Any]) -> None:
    """megatron's groups say which weights do; a pipeline stage may meet a norm before it meets a matrix."""
    job = Job(folder=folders["qwen3"], steps=1, optimizer=settings("adamw")).on(**layout)
    plain = run(dataclasses.replace(job, optimizer=dataclasses.replace(job.optimizer, weight_decay=0.0))).weights
    decayed = run(dataclasses.replace(job, optimizer=dataclasses.replace(job.optimizer, weight_decay=100.0))).weights
    for name, before in plain.items():
        assert torch.equal(decayed[name], before) == (before.dim() == 1), name


def round_trip(job: Job) -> tuple[bool, Counter[tuple[int, ...]]]:
    """On a rank: doubling of every hidden matrix through `each_whole`, and the shapes its function was called with
    here."""
    with opened(job.folder, job.layout, job.dtype) as model:
        inner = make_trainer(model, job.optimizer).inner
        _, place = inner.placed()
        params = [
            p
            for p, row in zip([p for g in inner.param_groups for p in g["params"]], place.rows, strict=True)
            if place.kinds[row] in ("matrix", "attention")
        ]
        seen: Counter[tuple[int, ...]] = Counter()

        def double(values: Tensor) -> Tensor:
            seen[tuple(values.shape)] += 1
            return 2 * values

        pairs = inner.shards.each_whole(
            params, lambda i: torch.stack([params[i].detach(), params[i].detach() + 1]), double, 2
        )
        results = dict(pairs)
        # the rows and columns of padded heads are zero whatever is computed: they are no part of the model
        padded = job.layout.head_multiple > 1
        equal = all(
            torch.equal(results[i][k], 2 * (p.detach() + k) * ((p != 0) if padded else 1))
            for i, p in enumerate(params)
            for k in range(2)
        )
        return equal and len(results) == len(params), seen


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tensor": 3},
        {"replicas": 3},
        {"tensor": 3, "replicas": 2},
        {"tensor": 3, "pipeline": 2},
        {"tensor": 4, "head_multiple": 4},
    ],
    ids=str,
)
def test_each_matrix_is_seen_whole_once_in_the_world(folders: dict[str, str], layout: dict[str, Any]) -> None:
    job = dataclasses.replace(Job(folder=folders["llama"]).on(**layout), micro=1)
    answers = fresh(job.ranks, round_trip, job)
    assert all(equal for equal, _ in answers)
    seen = sum((shapes for _, shapes in answers), Counter())
    hidden, ffn, heads, kv = (
        LLAMA[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    dim = LLAMA.get("head_dim") or hidden // heads
    layer = Counter([(2, heads * dim, hidden), (2, hidden, heads * dim), (2, hidden, ffn)])
    layer += Counter({(2, kv * dim, hidden): 2}) + Counter({(2, ffn, hidden): 2})
    assert seen == layer + layer


def test_largest_logits_are_the_naive_ones() -> None:
    gen = torch.Generator().manual_seed(1)
    query, key = torch.randn(21, 6, 8, generator=gen), torch.randn(21, 2, 8, generator=gen)
    segments = torch.tensor([[0, 5, -1], [5, 5, -1], [10, 4, 1], [14, 5, 1]])  # two tokens of padding
    naive = torch.full((2,), -torch.inf)
    for path in ([*range(5)], [*range(5, 14)], [*range(5, 10), *range(14, 19)]):
        for head in range(6):
            logits = (query[path, head] @ key[path, head // 3].T) / 8**0.5
            naive[head // 3] = torch.maximum(
                naive[head // 3], logits[torch.ones(len(path), len(path)).tril().bool()].max()
            )
    torch.testing.assert_close(largest_logits(query, key, segments, None), naive)


def clipped(job: Job) -> tuple[float, float]:
    """On a rank: the largest logit of a batch before and after a step that clips it and does nothing else."""
    with opened(job.folder, job.layout) as model:
        trainer = make_trainer(model, job.optimizer)
        assert isinstance(trainer.inner, MuonClip)
        found: list[float] = []
        from jobs import batch_of, task

        for _ in range(2):
            original = trainer.inner.logits.factors  # type: ignore[union-attr]

            def spy(threshold: float, original: Any = original) -> Any:
                found.append(float(trainer.inner.logits._gathered().max()))  # type: ignore[attr-defined]
                return original(threshold)

            trainer.inner.logits.factors = spy  # type: ignore[union-attr, method-assign]
            trainer.step(batch_of(model, 0, job.micro), task(model, "full"), 0.0)
            trainer.inner.logits.factors = original  # type: ignore[union-attr, method-assign]
        return found[0], found[1]


@pytest.mark.parametrize("model", ["qwen3", "llama"])
@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "replicas": 2, "head_multiple": 2}], ids=str)
def test_qk_clip_takes_the_logits_to_the_threshold(folders: dict[str, str], model: str, layout: dict[str, Any]) -> None:
    threshold = 0.02
    job = Job(folder=folders[model], optimizer=settings("muonclip", threshold=threshold)).on(**layout)
    for before, after in fresh(job.ranks, clipped, job):
        assert before > threshold
        # other layers' clipping moves a later layer's logits a little
        assert after <= threshold * 1.3


def test_kinds() -> None:
    from megatron_replay.models.spec import ModelSpec
    from megatron_replay.models.weight_table import WeightTable

    spec = ModelSpec.from_hf(LLAMA)
    kinds = Counter(map(kind_of, WeightTable(spec)))
    layers = spec.num_layers
    assert kinds == {
        "embedding": 2 - spec.tied,
        "vector": 2 * layers + 1,
        "attention": 2 * layers,
        "matrix": 2 * layers,
    }
