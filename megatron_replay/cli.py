"""The `megatron-replay` command: a verb names a function, which is imported when the verb is chosen.

`--help` needs neither torch nor megatron. Exit codes: 0 done; 2 wrong input, explained in one line; 1 a fault of ours,
with its traceback; 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_replay import __version__
from megatron_replay.cli_args import ALIASES, Arguments, configuration, entry, fields_help, is_file, keys_help, read
from megatron_replay.config import RunConfig
from megatron_replay.errors import ConfigError, ReplayError
from megatron_replay.registry import nearest

STORE_ACTIONS = ("inspect", "verify", "stats", "repair", "export", "compare")


def _config(words: Sequence[str], overrides: Sequence[str]) -> RunConfig:
    for word in words:
        if not is_file(word):
            raise ConfigError(f"{word!r} is neither a .yaml file nor section.key=value")
    if len(words) > 1:
        raise ConfigError(f"one configuration file at most, got {len(words)}: {', '.join(words)}")
    return configuration(words[0] if words else None, overrides)


def _run_config(given: Arguments) -> tuple[Any, ...]:
    return (_config(given.words, given.overrides),)


def _convert(given: Arguments) -> tuple[Any, ...]:
    if len(given.words) < 2:
        raise ConfigError("needs SOURCE and TARGET: a Hugging Face folder and a checkpoint folder, either way round")
    source, target, *rest = given.words
    return _config(rest, given.overrides), source, target


def _generate(given: Arguments) -> tuple[Any, ...]:
    prompts = [word for word in given.words if not is_file(word)]
    config = _config([word for word in given.words if is_file(word)], given.overrides)
    if len(prompts) > 1:
        raise ConfigError(f"one prompt at most, got {len(prompts)}; put it in quotes")
    return (
        dataclasses.replace(config, generate=dataclasses.replace(config.generate, prompt=prompts[0]))
        if prompts
        else config,
    )


def _launch(given: Arguments) -> tuple[Any, ...]:
    """The cluster's file and overrides, and the command that follows.

    The command is read here, so that its mistakes are reported before it starts.
    """
    runnable = [name for name, its in VERBS.items() if "ranks" in its.flags]
    if not given.command or given.command[0] not in runnable:
        raise ConfigError(
            f"needs the command that the nodes run: [CLUSTER.yaml] {{{','.join(runnable)}}} [RUN.yaml] ..."
        )
    if len(given.words) > 1:
        raise ConfigError(f"one cluster file at most, got {len(given.words)}: {', '.join(given.words)}")
    verb = VERBS[given.command[0]]
    its = read(given.command[1:], {flag: bool(one.value) for flag, one in verb.flags.items()})
    if "ranks" in its.flags:
        raise ConfigError(
            f"--ranks {its.flags['ranks']}: launch starts as many ranks as the nodes have devices; leave it out"
        )
    config: RunConfig = verb.arguments(its)[0]
    return config, given.command, given.words[0] if given.words else None, given.overrides


def _average(given: Arguments) -> tuple[Any, ...]:
    models = [word for word in given.words if not is_file(word)]
    if len(models) < 2:
        raise ConfigError("needs BASE and MODEL: the base model, and one or more trained from it")
    return _config([word for word in given.words if is_file(word)], given.overrides), models[0], tuple(models[1:])


def _ablate(given: Arguments) -> tuple[Any, ...]:
    from megatron_replay.ablation import Ablation
    from megatron_replay.config_file import load

    if len(given.words) != 1:
        raise ConfigError(f"needs one file that names the recipes, got {len(given.words)}")
    return load(Ablation, given.words[0], given.overrides), given.words[0], given.overrides


def _store(given: Arguments) -> tuple[Any, ...]:
    action, *paths = given.words or [""]
    if action not in STORE_ACTIONS:
        known = f"one of {', '.join(STORE_ACTIONS)}"
        raise ConfigError(
            f"unknown action {action!r}; {nearest(action, STORE_ACTIONS, otherwise=known)}"
            if action
            else f"needs an action: {known}"
        )
    if not paths:
        raise ConfigError(f"{action} needs the folder of a candidate store")
    return action, paths


def _compare(given: Arguments) -> tuple[Any, ...]:
    if len(given.words) != 2:
        raise ConfigError(f"needs two results that evaluate.output wrote, got {len(given.words)}")
    return tuple(given.words)


@dataclass(frozen=True)
class Flag:
    """A flag of one verb. `value` is the name of its value in the help, empty when it takes none."""

    meaning: str
    value: str = ""
    argument: str = ""
    """The keyword of the verb's function, when it differs from the flag's name."""


RANKS = {"ranks": Flag("Start this many processes on this machine (under torchrun its ranks are used instead).", "N")}
JSON = Flag("Print JSON.", argument="as_json")
DRY_RUN = Flag("Check everything, say what would be done, and stop.")


@dataclass(frozen=True)
class Verb:
    target: str
    """module:function, under megatron_replay.stages."""
    meaning: str
    sections: tuple[str, ...] = ()
    """Sections of the configuration that the verb's help lists."""
    words: str = "[RUN.yaml] [section.key=value ...]"
    flags: dict[str, Flag] = field(default_factory=dict)
    arguments: Callable[[Arguments], tuple[Any, ...]] = _run_config
    """The positional arguments of the function, from the arguments given."""
    keys: bool = True
    """True for a verb that reads a configuration."""
    settings: bool = False
    """True for a verb that reads a file of its own kind, whose keys can be given as key=value too."""
    runs: bool = False
    """True for a verb that another verb's command line follows.

    The verb's own flags stand before that, and the rest is passed on as it is.
    """


VERBS = {
    "doctor": Verb(
        "doctor:run",
        "Say what this machine can run: devices, kernels, packages, and what is missing.",
        ("layout",),
        flags={"json": JSON, "ops": Flag("Run a tiny collect and train too, and list each operator and where it ran.")},
    ),
    "convert": Verb(
        "convert:run",
        "Convert a model between a Hugging Face folder and a megatron checkpoint.",
        ("layout",),
        words="SOURCE TARGET [RUN.yaml] [section.key=value ...]",
        flags={"verify": Flag("Read the result back and compare every weight.")},
        arguments=_convert,
    ),
    "collect": Verb(
        "collect:run",
        "Stage 0: run the base model over the data once and store the candidate sets; write texts to rehearse.",
        ("data", "collect", "rehearsal", "layout", "batch"),
        flags={"dry-run": DRY_RUN, **RANKS},
    ),
    "store": Verb(
        "store:run",
        "Inspect, verify, summarise, repair, export or compare candidate stores.",
        words=f"{{{','.join(STORE_ACTIONS)}}} STORE [STORE ...]",
        flags={"output": Flag("Where export writes.", "FILE"), "json": JSON},
        arguments=_store,
        keys=False,
    ),
    "train": Verb(
        "train:run",
        "Stage 1: train with the loss restricted to the stored sets, or another, with rehearsal or without.",
        ("data", "train", "rehearsal", "adapter", "optimizer", "schedule", "layout", "batch"),
        flags={"dry-run": DRY_RUN, **RANKS},
    ),
    "evaluate": Verb(
        "evaluate:run", "Measure what was learnt and what was forgotten.", ("evaluate", "data", "layout"), flags=RANKS
    ),
    "compare": Verb(
        "compare:run",
        "Compare two results of evaluate question by question: differences, intervals and p values.",
        words="FIRST.json SECOND.json",
        flags={"json": JSON},
        arguments=_compare,
        keys=False,
    ),
    "average": Verb(
        "average:run",
        "Go part of the way back to the base model, and average checkpoints.",
        ("average", "evaluate", "layout"),
        words="BASE MODEL [MODEL ...] [RUN.yaml] [section.key=value ...]",
        flags=RANKS,
        arguments=_average,
    ),
    "ablate": Verb(
        "ablate:run",
        "Compare recipes: train each at several rates and seeds, and show gain against forgetting.",
        words="ABLATION.yaml [key=value ...]",
        flags={
            "dry-run": DRY_RUN,
            "workers": Flag("Runs at a time; one a core when it is not given, one on accelerators.", "N"),
            "arm": Flag("Do this run only, in this process; or `base`, the untrained model.", "NAME", argument="name"),
            "report": Flag("Write the report of the runs that are done, and start none."),
        },
        arguments=_ablate,
        keys=False,
        settings=True,
    ),
    "generate": Verb(
        "generate:run",
        "Continue a prompt.",
        ("generate", "layout"),
        words='["PROMPT"] [RUN.yaml] [section.key=value ...]',
        flags=RANKS,
        arguments=_generate,
    ),
    "launch": Verb(
        "launch:run",
        "Start a verb on the devices of one node or several: torchrun on each, with its environment checked.",
        words="[flags] [CLUSTER.yaml] [key=value ...] VERB [RUN.yaml] [section.key=value ...]",
        flags={
            "dry-run": Flag("Print what each node would run, its environment and the predicted memory, and stop."),
            "node-rank": Flag("Which node this is, from 0; NODE_RANK when it is not given.", "N", argument="rank"),
            "ssh": Flag("Start all nodes from here, by ssh."),
            "slurm": Flag("Write a file for sbatch instead.", "FILE"),
        },
        arguments=_launch,
        keys=False,
        runs=True,
    ),
    "demo": Verb(
        "demo:run",
        "The whole way on this machine: collect, train and compare with plain fine-tuning.",
        ("data", "collect", "train", "optimizer"),
        flags={"tiny": Flag("A smaller run of the same, for a first look.")},
    ),
}


def usage() -> str:
    """The text of `megatron-replay --help`."""
    verbs = [entry(name, verb.meaning, column=12) for name, verb in VERBS.items()]
    head = [
        "megatron-replay VERB ...",
        "",
        "Post-train a language model on a domain without forgetting what it knew.",
        "",
    ]
    return "\n".join(
        [
            *head,
            *verbs,
            "",
            "`megatron-replay VERB --help` lists the verb's keys and flags; `megatron-replay --version` the version.",
        ]
    )


def verb_usage(name: str) -> str:
    """The text of `megatron-replay VERB --help`."""
    verb = VERBS[name]
    text = [f"megatron-replay {name} {verb.words} [flags]", "", verb.meaning]
    if verb.flags:
        text += [
            "",
            "Flags",
            *(entry(f"--{flag} {its.value}".rstrip(), its.meaning) for flag, its in verb.flags.items()),
        ]
    if verb.runs:
        from megatron_replay.cluster import Cluster

        text += ["", "Keys of the cluster (YAML, or key=value before VERB)", *fields_help(Cluster)]
    if verb.settings:
        from megatron_replay.ablation import Ablation

        text += ["", "Keys of the file", *fields_help(Ablation)]
    if verb.keys:
        spelled = [entry(f"--{flag}" + (" VALUE" if "=" not in key else ""), key) for flag, key in ALIASES.items()]
        text += ["", keys_help(verb.sections), "", "The same keys in Megatron's spelling", *spelled]
    return "\n".join(text)


def call(name: str, tokens: Sequence[str]) -> int:
    """Run the verb `name` with these tokens, here or on `--ranks` processes; returns the exit code."""
    verb = VERBS[name]
    at = next((i for i, token in enumerate(tokens) if token in VERBS), len(tokens)) if verb.runs else len(tokens)
    spellings = ALIASES if verb.keys else {}
    given = read(
        tokens[:at],
        {flag: bool(its.value) for flag, its in verb.flags.items()},
        keys=verb.keys or verb.runs or verb.settings,
        spellings=spellings,
    )
    given.command = list(tokens[at:])
    ranks = _ranks(given.flags.pop("ranks", "1"))
    args, target = verb.arguments(given), f"megatron_replay.stages.{verb.target}"
    kwargs = {
        its.argument or flag.replace("-", "_"): given.flags.get(flag) if its.value else flag in given.flags
        for flag, its in verb.flags.items()
        if flag not in RANKS
    }
    if ranks > 1:
        launch = importlib.import_module("megatron_replay.parallel.ranks.spawn").launch
        return int(launch(target, args, kwargs, ranks, args[0].device))
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)(*args, **kwargs) or 0


def _ranks(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--ranks is a number of processes, at least 1, got {text!r}")
    return int(text)


def _main(tokens: Sequence[str]) -> int:
    if not tokens:
        raise ConfigError(f"needs a verb: {', '.join(VERBS)}")
    name, *rest = tokens
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name == "--version":
        print(f"megatron-replay {__version__}")
    elif name not in VERBS:
        raise ConfigError(f"unknown verb {name!r}; {nearest(name, VERBS)}")
    elif any(token in ("-h", "--help") for token in rest):
        print(verb_usage(name))
    else:
        return call(name, rest)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    tokens = sys.argv[1:] if argv is None else list(argv)
    verb = f" {tokens[0]}" if tokens and tokens[0] in VERBS else ""
    try:
        return _main(tokens)
    except ReplayError as err:
        print(f"megatron-replay{verb}: {' '.join(str(err).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return 1
