"""lm-evaluation-harness over a session: the same scores as its own Hugging Face model, on one process and on two."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Done, Served
from tinymodel import QWEN3, SETTINGS, Tiny, write_lines, write_model

from megatron_replay.cli_args import configuration
from megatron_replay.errors import ConfigError
from megatron_replay.runtime.session import open_session

instance = pytest.importorskip(
    "lm_eval.api.instance", reason="lm-eval is not installed; it comes with the extra `eval`"
)
Run = Callable[..., Done]

PAIRS = [
    ("count from 3:", " 4 5 6"),
    ("what is", " this"),
    ("", "no context"),
    ("trailing space ", "x"),
    ("a", "b" * 9),
]
TEXT = "one two three four five six seven " * 12
"""More tokens than the model's length, so that the rolling windows are several."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are the tokenizer's ids: its own model of the harness also counts rows beyond them."""
    return write_model(tmp_path_factory.mktemp("models") / "exact", {**QWEN3, "vocab_size": 257})


@pytest.fixture(scope="module")
def ours(model: Path, theirs: Any) -> Iterator[Any]:
    """After `theirs`: transformers first imported once a session was open leaves its rotary frequencies unset."""
    from megatron_replay.runtime.harness import HarnessModel

    config = configuration(None, [f"model={model}", *SETTINGS])
    with open_session(config, seq_length=config.data.seq_length) as session:
        yield HarnessModel(session)


@pytest.fixture(scope="module")
def theirs(model: Path) -> Any:
    models = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval's own model needs transformers")
    return models.HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=1, max_length=128)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return [instance.Instance(kind, {}, own, i) for i, own in enumerate(arguments)]


def test_likelihoods_are_those_of_its_own_model(ours: Any, theirs: Any) -> None:
    greedy = theirs.generate_until(requests("generate_until", ("count", {"until": [], "max_gen_toks": 4})))[0]
    asked = requests("loglikelihood", *PAIRS, ("count", greedy), ("x" * 300, " cut from the left"))
    found, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert found[len(PAIRS)][1] and not found[0][1]


def test_rolling_likelihoods_are_those_of_its_own_model(ours: Any, theirs: Any) -> None:
    asked = requests("loglikelihood_rolling", (TEXT,), ("short",), (TEXT[:128],), (TEXT[:129],))
    assert ours.loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked), rel=1e-5)


def test_generation_is_that_of_its_own_model(ours: Any, theirs: Any) -> None:
    free = {"until": [], "max_gen_toks": 12, "do_sample": False}
    whole = theirs.generate_until(requests("generate_until", ("count from 3", free)))[0]
    stop = whole[4]
    asked = requests(
        "generate_until",
        ("count from 3", free),
        ("count from 3", {**free, "until": [stop, "never"]}),
        ("what", {**free, "until": "e", "max_gen_toks": 5}),
        ("long " * 60, free),
    )
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(asked)
    assert found[1] == whole.partition(stop)[0]


def test_sampling_and_too_many_tokens_are_refused(ours: Any) -> None:
    with pytest.raises(ConfigError, match="generation is greedy; set do_sample=false"):
        ours.generate_until(requests("generate_until", ("a", {"do_sample": True})))
    with pytest.raises(ConfigError, match=r"leaves no room for questions in data\.seq_length=128"):
        ours.generate_until(requests("generate_until", ("a", {"max_gen_toks": 128})))


def test_chat_turns_are_written_by_the_template(ours: Any) -> None:
    turns = [{"role": "user", "content": "hello"}]
    text = ours.apply_chat_template(turns)
    assert "hello" in text and ours.tok_encode(text) == ours.session.template.prompt([_message("user", "hello")])
    assert ours.chat_template(True) and ours.chat_template(False) == "" and ours.tokenizer_name


def _message(role: str, content: str) -> Any:
    from megatron_replay.data.records import Message

    return Message(role, content)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of multiple choice and one of generation."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [{"q": f"what is {i}", "a": [f"{i}", f"{i + 1}", "zé"], "gold": i % 3} for i in range(6)]
    data = write_lines(folder / "data.jsonl", lines)
    common = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\nmetadata:\n  version: 1\n"
    )
    metrics = "metric_list:\n" + "".join(f"  - metric: {name}\n" for name in ("acc", "acc_norm", "acc_bytes"))
    (folder / "tiny_choice.yaml").write_text(
        f"task: tiny_choice\n{common}output_type: multiple_choice\ndoc_to_text: 'Question: {{{{q}}}}\\nAnswer:'\n"
        f"doc_to_choice: '{{{{a}}}}'\ndoc_to_target: gold\n{metrics}"
    )
    (folder / "tiny_generation.yaml").write_text(
        f"task: tiny_generation\n{common}output_type: generate_until\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_target: '{{a[0]}}'\ngeneration_kwargs:\n  until: ['Q']\n  max_gen_toks: 6\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    return folder


def test_evaluate_runs_its_tasks_on_any_layout(served: Served, tiny: Tiny, task: Path, tmp_path: Path) -> None:
    questions = [{"question": f"what is {i}", "choices": [f"{i}", f"{i + 1}", "zé"], "answer": i % 3} for i in range(6)]
    asked = [
        f"model={tiny.model}",
        *SETTINGS,
        "evaluate.lm_eval=tiny_choice,tiny_generation",
        f"evaluate.lm_eval_tasks={task}",
        f"evaluate.choice={write_lines(tmp_path / 'choice.jsonl', questions)}",
        "evaluate.choice_answers=text",
    ]
    for layout, ranks in (("tensor=1", "1"), ("tensor=2", "2"), ("tensor=1", "2")):
        name = f"{ranks}-{layout[-1]}"
        done = served(
            "evaluate", *asked, f"evaluate.output={name}.json", f"layout.{layout}", "--ranks", ranks, cwd=tmp_path
        )
        assert done.code == 0, done.out + done.err
        found = json.loads((tmp_path / f"{name}.json").read_text())
        choice = found["lm_eval"]["tiny_choice"]
        assert choice["acc"] == found["choice"]["accuracy"]["value"], "our own prompts are lm-eval's"
        assert choice["acc_bytes"] == found["choice"]["accuracy_normalised"]["value"]
        assert 0 <= found["lm_eval"]["tiny_generation"]["exact_match"] <= 1
    rows = [json.loads(line) for line in (tmp_path / "1-1.questions.jsonl").read_text().split("\n") if line]
    measures = {row["measure"] for row in rows}
    assert {"lm_eval.tiny_choice.acc", "lm_eval.tiny_generation.exact_match"} < measures
    same = served("compare", "1-1.json", "2-2.json", "--json", cwd=tmp_path)
    assert json.loads(same.out)["lm_eval.tiny_choice.acc"]["questions"] == 6


def test_an_unknown_task_is_refused(served: Served, tiny: Tiny, tmp_path: Path) -> None:
    done = served("evaluate", f"model={tiny.model}", *SETTINGS, "evaluate.lm_eval=no_such_task", cwd=tmp_path)
    assert done.code == 2 and "evaluate.lm_eval: unknown task no_such_task" in done.err
