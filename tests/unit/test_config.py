"""RunConfig from defaults, YAML and overrides; every mistake names its key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.config import Batch, Collect, Layout, Optimizer, RunConfig, build, dump, load
from megatron_replay.errors import ConfigError

TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=20)
CONFIGS = st.builds(
    RunConfig,
    model=TEXT,
    seed=st.integers(),
    precision=st.sampled_from(["auto", "fp32", "bf16", "fp64"]),
    collect=st.builds(Collect, tau=st.floats(0, 1, exclude_min=True), k_max=st.integers(2, 65_534)),
    optimizer=st.builds(
        Optimizer,
        name=TEXT,
        lr=st.floats(0, 1e300),
        betas=st.none() | st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
        options=st.dictionaries(
            st.from_regex(r"max_[a-z]{1,8}", fullmatch=True),
            st.one_of(st.integers(), TEXT, st.booleans(), st.none()),
            max_size=3,
        ),
    ),
    layout=st.builds(
        Layout,
        tensor=st.integers(1, 8),
        split=st.none() | st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    ),
    batch=st.integers(1, 64).map(lambda micro: Batch(micro=micro, total=4 * micro)),
)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        build(RunConfig, tree)
    return str(caught.value)


def test_defaults_are_those_of_the_paper() -> None:
    config = load(RunConfig)
    assert config == RunConfig()
    assert (config.collect.tau, config.collect.k_max, config.collect.strategy, config.collect.buckets) == (
        0.95,
        200,
        "bucket",
        5,
    )
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.clip_grad) == (
        "moclip",
        1.25e-6,
        None,  # moclip's own, (0.9, 0.95): tests/ranks/test_own_betas.py
        0.1,
        1.0,
    )
    assert (config.schedule.style, config.schedule.min_lr, config.seed, config.batch.total, config.data.seq_length) == (
        "cosine",
        1.25e-7,
        42,
        16,
        4096,
    )


@settings(deadline=None, max_examples=30)
@given(config=CONFIGS)
def test_what_dump_writes_load_reads_back(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> None:
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(RunConfig, path) == config


def test_the_last_one_wins(tmp_path: Path) -> None:
    path = written(tmp_path, "seed: 1\nlayout:\n  tensor: 2\n")
    assert load(RunConfig, path).layout == Layout(tensor=2)
    config = load(RunConfig, path, ["layout.tensor=4", "layout.pipeline=2", "layout.tensor=8"])
    assert (config.seed, config.layout.tensor, config.layout.pipeline) == (1, 8, 2)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(RunConfig, written(tmp_path, "# nothing yet\n")) == RunConfig()


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optimizer.lr=1e-6", "optimizer", "lr", 1e-6),  # a string to YAML 1.1
        ("optimizer.lr=1", "optimizer", "lr", 1.0),
        ("optimizer.betas=[0.5, 0.6]", "optimizer", "betas", (0.5, 0.6)),
        ("optimizer.betas=null", "optimizer", "betas", None),
        ("layout.split=[3, 4]", "layout", "split", (3, 4)),
        ("layout.split=null", "layout", "split", None),
        ("layout.stripe=false", "layout", "stripe", False),
        ("layout.stripe=null", "layout", "stripe", None),
        ("data.packing=false", "data", "packing", False),
        ("data.path=2024", "data", "path", "2024"),
        ("data.path=", "data", "path", ""),
        ("data.path=a=b", "data", "path", "a=b"),
        ("data.path=[x", "data", "path", "[x"),  # not YAML, so it is taken as it stands
        ("train.iters=5", "train", "iters", 5),
    ],
)
def test_an_override_is_read_as_its_key_wants_it(override: str, section: str, key: str, value: object) -> None:
    got = getattr(getattr(load(RunConfig, overrides=[override]), section), key)
    assert got == value and type(got) is type(value)


def test_a_key_the_optimizer_section_does_not_know_is_an_option() -> None:
    config = load(RunConfig, overrides=["optimizer.name=moclip", "optimizer.max_angle=60"])
    assert config.optimizer.options == {"max_angle": 60}
    assert "max_angle: 60" in dump(config) and "options" not in dump(config)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"layuot": {}}, "layuot: unknown key; did you mean 'layout'?"),
        ({"layout": {"tensr": 2}}, "layout.tensr: unknown key; did you mean 'tensor'?"),
        ({"generate": {"zzz": 2}}, "generate.zzz: unknown key; known keys: prompt, raw, max_new_tokens"),
        ({"layout": 3}, "layout: expected a section with keys, got 3"),
        ({"layout": {"tensor": "two"}}, "layout.tensor: expected int, got 'two'"),
        ({"layout": {"tensor": True}}, "layout.tensor: expected int, got True"),
        ({"layout": {"tensor": 1.5}}, "layout.tensor: expected int, got 1.5"),
        ({"layout": {"split": [1, "x"]}}, "layout.split[1]: expected int, got 'x'"),
        ({"layout": {"split": 3}}, "layout.split: expected a list, got 3"),
        ({"data": {"packing": 1}}, "data.packing: expected bool, got 1"),
        ({"data": {"path": ["a"]}}, "data.path: expected str, got ['a']"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr: expected float, got 'fast'"),
        (
            {"collect": {"strategy": "buckt"}},
            "collect.strategy: 'buckt' is not one of all, random, last, bucket; did you mean 'bucket'?",
        ),
        ({"device": "tpu9"}, "device: 'tpu9' is not one of auto, cpu, cuda, npu"),
    ],
)
def test_a_wrong_key_or_type_is_named(tree: dict[str, Any], message: str) -> None:
    assert refused(tree).startswith(message)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("data", {"seq_length": 0}, "seq_length must be above 0, got 0"),
        ("data", {"limit": -1}, "limit must be above 0, got -1"),
        ("collect", {"tau": 0}, "tau is a probability mass in (0, 1], got 0"),
        ("collect", {"tau": 1.5}, "tau is a probability mass in (0, 1], got 1.5"),
        ("collect", {"fraction": 0}, "fraction is a share in (0, 1], got 0"),
        ("collect", {"k_max": 0}, "k_max must lie in 1..65534"),
        ("collect", {"k_max": 65_535}, "k_max must lie in 1..65534"),
        ("collect", {"min_set_size": 201}, "min_set_size must lie in 1..k_max (200), got 201"),
        ("collect", {"chunk_rows": 0}, "chunk_rows must be above 0, got 0"),
        ("train", {"epochs": 0}, "epochs must be above 0, got 0"),
        ("train", {"save_interval": 0}, "save_interval must be above 0, got 0"),
        ("optimizer", {"lr": -1}, "lr must be at least 0, got -1"),
        ("optimizer", {"lr": float("nan")}, "lr must be at least 0, got nan"),
        ("optimizer", {"betas": [0.9]}, "betas are two numbers in [0, 1), got [0.9]"),
        ("optimizer", {"betas": [0.9, 1.0]}, "betas are two numbers in [0, 1), got [0.9, 1.0]"),
        ("optimizer", {"clip_grad": -0.5}, "clip_grad must be at least 0, got -0.5"),
        ("layout", {"pipeline": 0}, "pipeline must be above 0, got 0"),
        ("batch", {"micro": 3}, "batch.total (16) must be a multiple of batch.micro (3)"),
        ("evaluate", {"window": 1}, "window must be at least 2 tokens, got 1"),
        ("evaluate", {"batch": 0}, "batch must be above 0, got 0"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_section(section: str, values: dict[str, Any], message: str) -> None:
    said = refused({section: values})
    assert said.startswith(f"{section}.") and message in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [1", "line 1: not valid YAML"),
        ("a: 1\nb: c: d\n", "line 2: not valid YAML"),
        ("- 1\n", "expected 'key: value' lines, got list"),
        ("just text\n", "expected 'key: value' lines, got str"),
    ],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot read the configuration: No such file"):
        load(RunConfig, tmp_path / "absent.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"bytes\.yaml"):
        load(RunConfig, tmp_path / "bytes.yaml")


def test_an_override_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match=r"override 'layout\.tensor' has no '='"):
        load(RunConfig, overrides=["layout.tensor"])
    with pytest.raises(ConfigError, match="'seed' is a value, not a section"):
        load(RunConfig, overrides=["seed=1", "seed.x=2"])


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 1  # type: ignore[misc]


def test_stripes_are_for_tensor_ranks_unless_told_otherwise() -> None:
    assert [Layout(tensor=tensor).striped for tensor in (1, 2, 4)] == [False, True, True]
    assert Layout(stripe=True).striped and not Layout(tensor=2, stripe=False).striped
