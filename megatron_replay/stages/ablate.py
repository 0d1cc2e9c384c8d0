"""A comparison of recipes: each is trained at several rates with several seeds, measured, and set beside the others.

Every run is a process of its own, and one that is done is never repeated. So a comparison that was stopped goes on, and
one that has grown runs what is new. Stores and texts are collected once for all runs whose settings agree.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from megatron_replay import config as configs
from megatron_replay.ablation import BASE, Ablation, Arm, digest
from megatron_replay.config import RunConfig, dump
from megatron_replay.config_file import changed
from megatron_replay.device import choose
from megatron_replay.errors import ConfigError, ReplayError
from megatron_replay.parallel.losses import LOSSES
from megatron_replay.runtime.arms import configured, read_row, trained, write_row
from megatron_replay.runtime.output_paths import check_folder, replace_file
from megatron_replay.runtime.session import open_session
from megatron_replay.runtime.training import check_run
from megatron_replay.scoring.ablation_report import write_report
from megatron_replay.stages.evaluate import check, evaluate

LOG = "log.txt"


def run(
    ablation: Ablation,
    file: str,
    overrides: Sequence[str],
    *,
    dry_run: bool = False,
    workers: str | None = None,
    name: str | None = None,
    report: bool = False,
) -> int:
    """Do the runs that are missing, and write the report; returns the exit code, 1 when a run failed.

    - file, overrides: the ablation's own, for the processes of its runs.
    - name: do this run only, here.

    Raises ConfigError for a recipe that cannot run, before anything is started.
    """
    check_folder(ablation.output, "output")
    if name is not None:
        _do(_placed(ablation, ablation.arm(name)))
        return 0
    arms = [_placed(ablation, arm) for arm in (ablation.arm(BASE), *ablation.arms())]
    for arm in arms:
        check(arm.config)
        if arm.recipe != BASE:
            check_run(arm.config)
    missing = [arm for arm in arms if read_row(_folder(arm), arm.identity) is None]
    print(f"{len(arms)} runs, {len(arms) - len(missing)} done, {len(missing)} to do")
    if dry_run:
        print("\n".join(arm.name for arm in missing))
        return 0
    failed: list[str] = []
    if not report:
        failed = _start(
            missing, _Collections(Path(ablation.output) / "collect", arms), file, overrides, _workers(workers, ablation)
        )
    rows = [row for arm in arms if (row := read_row(_folder(arm), arm.identity)) is not None]
    if rows:
        print(write_report(ablation, rows, Path(ablation.output)))
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def _workers(asked: str | None, ablation: Ablation) -> int:
    if asked is None:
        config = ablation.arm(BASE).config
        return (os.cpu_count() or 1) if choose(config.device).name == "cpu" else 1
    if not asked.isdecimal() or int(asked) < 1:
        raise ConfigError(f"--workers is a number of runs at a time, at least 1, got {asked!r}")
    return int(asked)


def _placed(ablation: Ablation, arm: Arm) -> Arm:
    """The run with its outputs, its store and its texts in the comparison's folder."""
    root = Path(ablation.output)
    config = configured(arm.config, root / "runs" / arm.name)
    trains = arm.recipe != BASE
    collecting, rehearsal = config.collect, config.rehearsal
    shared = changed(RunConfig(model=config.model, tokenizer=config.tokenizer, data=config.data))
    if not collecting.store:
        made = digest([shared, changed(config.collect)])
        collecting = replace(collecting, store=str(root / "stores" / made))
    rehearses = trains and bool(rehearsal.weight or rehearsal.prompts) and rehearsal.samples > 0
    if not rehearsal.path and rehearsal != configs.Rehearsal():
        # what training alone reads makes no other texts
        asked = changed(replace(rehearsal, weight=1.0, prompts=0.0, share=1.0, every=1, loss="kl"))
        rehearsal = replace(rehearsal, path=str(root / "texts" / digest([shared, asked])) if rehearses else "")
    store = collecting.store if trains and LOSSES.get(config.train.loss).needs_sets else ""
    train = replace(config.train, store=config.train.store or store)
    placed = replace(config, collect=collecting, rehearsal=rehearsal, train=train)
    return replace(arm, config=placed, identity=_identity(arm))


def _folder(arm: Arm) -> Path:
    return Path(arm.config.output)


def _identity(arm: Arm) -> str:
    """The settings of a run before it has folders: a run with others must be done again."""
    return digest(changed(arm.config))  # a key that a later version adds changes nothing


class _Collections:
    """The stores and texts of a comparison: each is made once, before the first run that needs it."""

    def __init__(self, folder: Path, arms: Sequence[Arm]) -> None:
        """arms: all runs, done or not, since two that share texts ask for the same prompts."""
        self._folder, self._lock, self._made = folder, Lock(), set[str]()
        self._prompts: dict[str, float] = {}
        self._seed = arms[0].config.seed  # the untrained model's: runs of all seeds share what is collected
        for arm in arms:
            asked = arm.config.rehearsal
            self._prompts[asked.path] = max(asked.prompts, self._prompts.get(asked.path, 0.0))

    def ensure(self, arm: Arm) -> None:
        """Make what a run needs. Raises ReplayError where a collection fails."""
        config = replace(arm.config, seed=self._seed)
        store, texts = config.train.store, config.rehearsal.path if arm.recipe != BASE else ""
        rehearsal = replace(config.rehearsal, prompts=self._prompts[config.rehearsal.path])
        with self._lock:
            if store:
                self._make(store, replace(config, rehearsal=configs.Rehearsal()))
            if texts:
                self._make(texts, replace(config, collect=configs.Collect(), rehearsal=rehearsal))

    def _make(self, path: str, config: RunConfig) -> None:
        """Run `collect` once for what lies at a path; its configuration stays, so that it can be repeated by hand."""
        if path not in self._made:
            file = self._folder / f"{Path(path).name}.yaml"
            replace_file(file, dump(config))
            _child(["-m", "megatron_replay", "collect", str(file)], None)
            self._made.add(path)


def _start(
    arms: Sequence[Arm], collections: _Collections, file: str, overrides: Sequence[str], workers: int
) -> list[str]:
    """Start the runs, some at a time; returns a line for each that failed.

    A collection that fails ends the comparison, a run that fails does not.
    """
    failed = []
    with ThreadPoolExecutor(workers) as pool:
        started = {pool.submit(_process, arm, collections, file, overrides): arm for arm in arms}
        for done, future in enumerate(as_completed(started), 1):
            arm = started[future]
            try:
                code = future.result()
            except ReplayError:
                pool.shutdown(cancel_futures=True)
                raise
            print(f"{done} of {len(arms)}: {arm.name}{f': failed ({code})' if code else ''}", flush=True)
            if code:
                failed.append(f"{arm.name} failed with exit code {code}; see {_folder(arm) / LOG}")
    return failed


def _process(arm: Arm, collections: _Collections, file: str, overrides: Sequence[str]) -> int:
    collections.ensure(arm)
    folder = _folder(arm)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").unlink(missing_ok=True)  # of an attempt that was stopped
    with open(folder / LOG, "w", encoding="utf-8") as log:
        return _child(["-m", "megatron_replay", "ablate", file, *overrides, "--arm", arm.name], log)


def _child(words: Sequence[str], log: Any) -> int:
    """Run this interpreter; returns its exit code. log: where its output goes; None for what must succeed."""
    done = subprocess.run([sys.executable, *words], stdout=log, stderr=subprocess.STDOUT if log else None, check=False)
    if log is None and done.returncode:
        raise ReplayError(
            f"the collection for these runs failed with exit code {done.returncode}; its message is above"
        )
    return done.returncode


def _do(arm: Arm) -> None:
    """One run: train, unless it is the untrained model, and measure."""
    with open_session(arm.config, seq_length=arm.config.data.seq_length) as session:
        costs = {} if arm.recipe == BASE else trained(session)
        result = evaluate(session)
        if session.world.is_main:
            write_row(_folder(arm), arm, costs, result)
