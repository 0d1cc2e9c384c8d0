"""The study of recipes: what each learns and forgets on a real model, at several rates and seeds.

    python benchmarks/recipes.py prepare STUDY --model MODEL --data DATA --folder FOLDER
    megatron-replay collect FOLDER/own.yaml
    megatron-replay ablate FOLDER/study.yaml --workers 1
    python benchmarks/recipes.py rows --folder FOLDER --output benchmarks/results/recipes_STUDY.csv

STUDY is `stories` (stories260K learns Spider's questions and queries as plain text; a run takes seconds) or `spider`
(a 135M model learns text-to-SQL by databases). DATA is a folder with nl2sql/ (Spider's training questions, schemas and
databases), general/ (GSM8K, MMLU, BBH) and text/ (WikiText-2, TinyShakespeare). What is forgotten is measured on texts
that no recipe rehearses; `own` are texts that the base model wrote with another seed.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from rows import about, append, machine

Line = dict[str, Any]

TRAIN, TEST = 300, 120
"""Questions to train on, and questions on other databases."""
GENERAL = 40
"""Records of each general data set."""
LONGEST = 450
"""Characters of a schema, at most."""


def prompt(schema: str, question: str) -> str:
    return f"Schema:\n{schema}\nQuestion: {question}\nSQL:\n"


def spider(data: Path) -> tuple[list[Line], list[Line]]:
    """Questions to train on and to test with: no database has both, and each has a file to run queries on."""
    schemas = json.loads((data / "nl2sql" / "spider_schemas.json").read_text(encoding="utf-8"))
    rows = _jsonl(data / "nl2sql" / "spider_train.jsonl")
    there = {path.stem for path in (data / "nl2sql" / "databases").glob("*.sqlite")}
    names = sorted(name for name in {row["db_id"] for row in rows} & there if len(schemas[name]) <= LONGEST)
    random.Random(1).shuffle(names)
    held_out = set(names[: len(names) // 4])
    lines: dict[bool, list[Line]] = {True: [], False: []}
    for row in rows:
        if row["db_id"] in names:
            text = prompt(schemas[row["db_id"]], row["question"])
            line = {"db_id": row["db_id"], "prompt": text, "completion": row["query"], "query": row["query"]}
            lines[row["db_id"] in held_out].append(line)
    for some in lines.values():
        random.Random(2).shuffle(some)
    return lines[False][:TRAIN], lines[True][:TEST]


def gsm8k(data: Path) -> list[Line]:
    rows = _jsonl(data / "general" / "gsm8k_train.jsonl")[:GENERAL]
    return [{"prompt": row["question"], "completion": row["answer"]} for row in rows]


def mmlu(data: Path) -> list[Line]:
    """A question of each subject, with its choices; the text of the right one is the target."""
    found = []
    for path in sorted((data / "general" / "mmlu_dev").glob("*.csv"))[:GENERAL]:
        with path.open(encoding="utf-8", newline="") as file:
            _, (question, *choices, right) = islice(csv.reader(file), 2)
        letter = "ABCD"[int(right)]
        listed = "\n".join(f"{name}. {choice}" for name, choice in zip("ABCD", choices, strict=True))
        found.append({"prompt": f"{question}\n{listed}", "completion": f"{letter}. {choices[int(right)]}"})
    return found


def bbh(data: Path) -> list[Line]:
    """Questions of each task in turn; the answer is the target."""
    tasks = [
        json.loads(path.read_text(encoding="utf-8"))["examples"]
        for path in sorted((data / "general" / "bbh").glob("*.json"))
    ]
    mixed = [row for rows in zip(*tasks, strict=False) for row in rows if len(row["input"]) < 600]
    return [{"prompt": row["input"], "completion": row["target"]} for row in mixed[:GENERAL]]


def spider_keys(model: str, data: Path, folder: Path) -> Line:
    """The keys that all runs of the spider study share."""
    return {
        "model": model,
        "device": "cpu",
        "data": {
            "path": str(folder / "train.jsonl"),
            "seq_length": 512,
            "share_prefixes": True,
            "group_prefixes": True,
        },
        "collect": {"strategy": "all", "tau": 0.95},
        "rehearsal": {"samples": 256, "max_new_tokens": 96, "batch": 32, "weight": 0.0},
        "train": {"loss": "full", "epochs": 3},
        "optimizer": {"name": "adamw"},
        "schedule": {"style": "cosine", "warmup_iters": 4, "min_lr": 0.0},
        "batch": {"total": 2},
        "evaluate": {
            "text": {
                "wikitext": str(data / "text" / "wikitext2_valid.txt"),
                "shakespeare": str(data / "text" / "tinyshakespeare.txt"),
            },
            "text_tokens": 4096,
            "targets": {
                "sql": str(folder / "test.jsonl"),
                "own": str(folder / "own"),
                **{name: str(folder / f"{name}.jsonl") for name in ("gsm8k", "mmlu", "bbh")},
            },
            "base": model,
        },
    }


def stories_keys(model: str, data: Path, folder: Path) -> Line:
    """The keys that all runs of the stories study share: 100 steps of 4 windows of 64 tokens."""
    return {
        "model": model,
        "device": "cpu",
        "data": {"path": str(folder / "train.txt"), "seq_length": 64},
        "collect": {"strategy": "all", "tau": 0.99, "k_max": 64},
        "rehearsal": {"samples": 160, "max_new_tokens": 63, "batch": 32, "share": 0.25, "weight": 0.0},
        "train": {"loss": "full", "iters": 100},
        "optimizer": {"name": "adamw"},
        "schedule": {"style": "constant", "warmup_iters": 10},
        "batch": {"micro": 4, "total": 4},
        "evaluate": {
            "text": {
                "domain": str(folder / "test.txt"),
                "shakespeare": str(data / "text" / "tinyshakespeare.txt"),
            },
            "text_tokens": 16_384,
            "window": 64,
            "targets": {"own": str(folder / "own")},
        },
    }


KL = {"rehearsal.weight": 1.0}
RESTRICTED = {"train.loss": "restricted"}
MOCLIP = {"optimizer.name": "moclip", "optimizer.max_angle": 45}
TAM = {"optimizer.name": "tam"}
NO_MOMENTUM = {"optimizer.betas": [0.0, 0.95]}
RECIPES: dict[str, Line] = {
    "adamw": {},
    "rehearsal-1": KL,
    "tam": TAM,
    "rehearsal-1-tam": {**KL, **TAM},
    "moclip": MOCLIP,
    "rehearsal-1-moclip": {**KL, **MOCLIP},
    "rehearsal-0.25": {"rehearsal.weight": 0.25},
    "rehearsal-0.25-tam": {"rehearsal.weight": 0.25, **TAM},
    "prompts-1": {"rehearsal.prompts": 1.0},
    "rehearsal-1-prompts-1": {**KL, "rehearsal.prompts": 1.0},
    "paper": {**RESTRICTED, **MOCLIP, "collect.strategy": "bucket", "collect.tau": 0.95, "collect.k_max": 200},
    "restricted-adamw": RESTRICTED,
    "sampled": {"train.loss": "sampled", "collect.stop_token": True},
    "rehearsal-1-sampled": {**KL, "train.loss": "sampled", "collect.stop_token": True},
    "appended": {"train.loss": "appended", "collect.stop_token": True},
    "rehearsal-4-every-4": {"rehearsal.weight": 4.0, "rehearsal.every": 4},
    "rehearsal-1-rest": {**KL, "rehearsal.loss": "kl_rest"},
    "rehearsal-1-nll": {**KL, "rehearsal.loss": "full"},
    "rehearsal-1-16-texts": {**KL, "rehearsal.samples": 16},
    "rehearsal-1-free": {**KL, "rehearsal.source": ["free"]},
    "adamw-no-momentum": NO_MOMENTUM,
    "rehearsal-1-no-momentum": {**KL, **NO_MOMENTUM},
    "mofo": {"optimizer.name": "mofo"},
    "eaft": {"train.loss": "eaft"},
    "talr": {"train.loss": "talr"},
    "lora": {"adapter.rank": 16},
    "way-back-0.85": {"average.sweep": [0.85]},
    "rehearsal-1-way-back-0.85": {**KL, "average.sweep": [0.85]},
    "half": {"train.freeze_share": 0.5},
}
NO_PROMPTS = ("prompts-1", "rehearsal-1-prompts-1", "rehearsal-1-free")
"""What plain text has no use for: it has no prompts, and its model writes from nothing anyway."""


def spider_study(model: str, data: Path, folder: Path) -> Line:
    train, test = spider(data)
    sets = {"train": train, "test": test, "gsm8k": gsm8k(data), "mmlu": mmlu(data), "bbh": bbh(data)}
    for name, lines in sets.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    recipes = {**RECIPES, "lora": {**RECIPES["lora"], "rates": [5e-4, 1e-3, 2e-3]}}
    return {
        "rates": [1e-4, 2e-4, 4e-4],
        "gain": "targets.sql.nll",
        "forgetting": [
            *(f"text.{name}.nll" for name in ("wikitext", "shakespeare")),
            *(f"targets.{name}.nll" for name in ("gsm8k", "mmlu", "bbh")),
        ],
        "run": spider_keys(model, data, folder),
        "recipes": recipes,
    }


def stories_study(model: str, data: Path, folder: Path) -> Line:
    rows = _jsonl(data / "nl2sql" / "spider_train.jsonl")
    random.Random(3).shuffle(rows)
    texts = [f"{row['question']}\n{row['query']}\n" for row in rows]
    cut = len(texts) * 9 // 10
    for name, some in (("train", texts[:cut]), ("test", texts[cut:])):
        (folder / f"{name}.txt").write_text("".join(some), encoding="utf-8")
    rates = [4e-4, 7e-4, 1.2e-3, 2e-3, 3.5e-3]
    return {
        "rates": rates,
        "gain": "text.domain.nll",
        "forgetting": ["targets.own.nll"],
        "run": stories_keys(model, data, folder),
        "recipes": {name: keys for name, keys in RECIPES.items() if name not in NO_PROMPTS},
    }


STUDIES = {"spider": spider_study, "stories": stories_study}


def prepare(study: str, model: str, data: Path, folder: Path) -> None:
    """Write the data files, the comparison, and the configuration of the texts that measure forgetting."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"output": str(folder / "study"), "seeds": [1], **STUDIES[study](model, data, folder)}
    (folder / "study.yaml").write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
    texts = {"samples": 40, "max_new_tokens": 96, "batch": 20}
    if study == "stories":
        texts = {"samples": 200, "max_new_tokens": 63, "batch": 50}
    own = {"model": model, "device": "cpu", "seed": 777, "rehearsal": {"path": str(folder / "own"), **texts}}
    (folder / "own.yaml").write_text(yaml.safe_dump(own, sort_keys=False), encoding="utf-8")
    print(f"megatron-replay collect {folder / 'own.yaml'}; megatron-replay ablate {folder / 'study.yaml'}")


def rows(folder: Path, output: Path | None) -> None:
    """Write the rows of all runs that are done; a table that is there is replaced."""
    with (folder / "study" / "rows.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    if output is not None:
        output.unlink(missing_ok=True)
    facts = about("megatron-replay ablate study.yaml", machine())
    append([{**facts, **row} for row in found], output)


def _jsonl(path: Path) -> list[Line]:
    return list(_lines(path))


def _lines(path: Path) -> Iterator[Line]:
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            yield json.loads(line)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("prepare")
    making.add_argument("study", choices=STUDIES)
    making.add_argument("--model", required=True, help="a Hugging Face folder")
    making.add_argument("--data", type=Path, required=True)
    making.add_argument("--folder", type=Path, required=True)
    writing = verbs.add_parser("rows")
    writing.add_argument("--folder", type=Path, required=True)
    writing.add_argument("--output", type=Path)
    given = vars(parser.parse_args(arguments))
    {"prepare": prepare, "rows": rows}[given.pop("verb")](**given)


if __name__ == "__main__":
    main()
