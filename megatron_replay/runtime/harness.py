"""A session's model for lm-evaluation-harness, on any layout, and the measure that runs its tasks.

Every rank gives the same requests to the same methods. The sequences are dealt to the replicas below that, so the
harness sees one process.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_replay.data.records import Message
from megatron_replay.errors import ConfigError, DataError
from megatron_replay.parallel.generation import generate
from megatron_replay.parallel.inference import token_is_greedy
from megatron_replay.runtime.benchmarks import holds
from megatron_replay.runtime.likelihood import sequence_nll
from megatron_replay.runtime.session import Session
from megatron_replay.scoring.generation import finished

JUDGED = ("acc", "acc_norm", "acc_bytes", "exact_match")
"""Metrics that say of each question whether it is right."""

Encoded = tuple[Any, list[int], list[int]]
"""(what was asked, ids of the context, ids of the continuation)"""


class HarnessModel(TemplateLM):
    """lm-eval's interface over the model of a session: likelihoods, rolling likelihoods, and greedy generation.

    `max_length` is `data.seq_length`, or the model's own length where that is less; longer contexts lose their
    beginning, as in lm-eval's own models.
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.max_length = min(session.config.data.seq_length, session.source.spec.max_positions)
        self.max_gen_toks = session.config.evaluate.max_new_tokens

    @property
    def eot_token_id(self) -> int:
        if not self.session.tokenizer.eos_ids:
            raise DataError("lm-eval needs an end token; set eos_token_id in the model's generation_config.json")
        return self.session.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What a text's first token is predicted from."""
        bos = self.session.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.session.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What names the template in the harness's caches."""
        return self.session.template.fingerprint if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]
        return self.session.template.render(messages, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, after bos where the tokenizer's texts begin with it and this one does not yet."""
        tokenizer = self.session.tokenizer
        ids = tokenizer.encode(string)
        adds = tokenizer.add_bos if add_special_tokens is None else add_special_tokens and tokenizer.add_bos
        if not adds or tokenizer.bos_id is None or (add_special_tokens is None and ids[:1] == [tokenizer.bos_id]):
            return ids
        return [tokenizer.bos_id, *ids]

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_: Any) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy decoding gives it) of each continuation."""
        sequences, positions = self._placed([(context, after) for _, context, after in requests])
        nll = sequence_nll(self.session, sequences, positions, "lm-eval likelihoods")
        with self.session.progress("lm-eval greedy", len(sequences), "sequences") as advance:
            greedy = token_is_greedy(
                self.session.model,
                sequences,
                positions,
                vocab_size=self.session.vocab_size,
                row_tokens=self.session.config.data.seq_length,
                progress=advance,
            )
        return [(-_sum(values), bool(own.all())) for values, own in zip(nll, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in lm-eval's windows: each token counts once."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        sequences, positions = self._placed([pair for own in windows for pair in own])
        nll = iter(sequence_nll(self.session, sequences, positions, "lm-eval texts"))
        return [-sum(_sum(next(nll)) for _ in own) for own in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each cut at the first of its stop texts. Raises ConfigError for a task that samples."""
        groups: dict[tuple[tuple[str, ...], int], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[self._limits(request.args[1])].append(index)
        answers = [""] * len(requests)
        for (stops, most), indices in groups.items():
            texts = [requests[index].args[0] for index in indices]
            for index, answer in zip(indices, self._continued(texts, stops, most), strict=True):
                answers[index] = answer
        return answers

    def _continued(self, texts: Sequence[str], stops: tuple[str, ...], most: int) -> list[str]:
        room = self.max_length - most
        if room < 1:
            raise ConfigError(
                f"a task generates {most} tokens, which leaves no room for questions in data.seq_length="
                f"{self.max_length}; raise it"
            )
        with self.session.progress("lm-eval answers", len(texts), "questions") as advance:
            found = generate(
                self.session.model,
                [self.tok_encode(text)[-room:] for text in texts],
                max_new_tokens=most,
                stop_ids=self.session.stop_ids,
                vocab_size=self.session.vocab_size,
                batch=self.session.config.evaluate.batch,
                ended=holds(self.session, stops),
                progress=advance,
            )
        return [finished(self.session.tokenizer.decode(tokens), *stops) for tokens in found]

    def _limits(self, asked: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        """The stop texts and the number of tokens of a request's keyword arguments."""
        if asked.get("do_sample") or asked.get("num_beams", 1) != 1:
            raise ConfigError(
                f"a task asks for sampling or beams ({asked}), but generation is greedy; set do_sample=false"
            )
        until = asked.get("until") or []
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        most = next((int(asked[name]) for name in names if asked.get(name)), self.max_gen_toks)
        return tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop), most

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """lm-eval's windows of a text: (context, what is predicted)."""
        ids = self.tok_encode(text)
        return map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1))

    def _placed(self, pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Ids of context and continuation, cut from the left, and the positions that predict the continuation."""
        sequences = [np.asarray((context + after)[-(self.max_length + 1) :]) for context, after in pairs]
        positions = [
            np.arange(len(s) - len(after) - 1, len(s) - 1) for s, (_, after) in zip(sequences, pairs, strict=True)
        ]
        return sequences, positions


def tasks(session: Session) -> dict[str, Any]:
    """{task: {metric: value}} of `evaluate.lm_eval`, with its questions as rows.

    Raises ConfigError for an unknown task.
    """
    asked = session.config.evaluate
    manager = TaskManager(include_path=asked.lm_eval_tasks or None, include_defaults=not asked.lm_eval_tasks)
    names = [name.strip() for name in asked.lm_eval.split(",") if name.strip()]
    if missing := [name for name in names if not manager.match_tasks([name])]:
        raise ConfigError(
            f"evaluate.lm_eval: unknown task {', '.join(missing)}; `lm-eval ls tasks` lists the known ones, "
            "evaluate.lm_eval_tasks names a folder of others"
        )
    level = logging.getLogger("lm_eval").level
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    try:
        found = simple_evaluate(
            HarnessModel(session),
            tasks=names,
            num_fewshot=asked.shots or None,
            limit=asked.limit,
            apply_chat_template=asked.style == "chat",
            task_manager=manager,
            bootstrap_iters=0,
        )
    finally:
        logging.getLogger("lm_eval").setLevel(level)
    # the harness gives the result to the first process of a node only
    found = session.world.gather_objects(found and {key: found[key] for key in ("results", "samples")})[0]
    results = {name: _metrics(values) for name, values in found["results"].items()}
    for name, samples in found["samples"].items():
        results[name]["rows"] = list(_rows(samples))
    return results


def _metrics(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers by metric; "acc,none" is "acc", "exact_match,strict-match" is "exact_match.strict-match"."""
    return {
        key.removesuffix(",none").replace(",", "."): value
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _rows(samples: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for sample in samples:
        for metric in JUDGED:
            if sample.get(metric) in (0, 1):
                about = "" if sample["filter"] == "none" else f".{sample['filter']}"
                question = sample["prompt_hash"][:16]
                yield {"measure": metric + about, "question": question, "correct": bool(sample[metric])}


def _sum(values: np.ndarray) -> float:
    return float(values.sum(dtype=np.float64))
