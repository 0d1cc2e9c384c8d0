"""Typed configuration: what each key is called, means and may be; `config_file` reads and writes it.

One `RunConfig` serves every verb: `collect`, `train` and `evaluate` read the same file. So the run that made a store is
the run that uses it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_replay.candidates import CandidateRule
from megatron_replay.config_file import build, dump, load
from megatron_replay.errors import ConfigError

__all__ = [
    "Adapter",
    "Average",
    "Batch",
    "Collect",
    "Data",
    "Evaluate",
    "Generate",
    "Layout",
    "Optimizer",
    "Rehearsal",
    "RunConfig",
    "Schedule",
    "Train",
    "build",
    "dump",
    "load",
]


ADAM_BETAS = (0.9, 0.95)
"""The betas of every optimizer here that keeps Adam's two moments, where a run sets none."""


def _positive(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name} must be above 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training text and how it becomes token ids."""

    path: str = ""
    """A .jsonl (prompt/completion, alpaca, sharegpt, messages) or .txt file; several are separated by commas."""
    format: Literal["auto", "prompt_completion", "alpaca", "sharegpt", "messages", "text"] = "auto"
    template: str = "auto"
    """auto: the model's own chat template, or plain where it has none; plain; or the path of a jinja2 file."""
    seq_length: int = 4096
    """Tokens in a row; no sample may be longer."""
    over_length: Literal["error", "drop", "truncate"] = "error"
    packing: bool = True
    """Put several samples in one row (attention never crosses samples); false: one sample in a row."""
    share_prefixes: bool = False
    """Compute a beginning that samples of a micro-batch have in common once; exact but for rounding. `collect` and
    `evaluate` also lay samples that begin alike together."""
    group_prefixes: bool = False
    """`train` draws rows of samples that begin alike, as many as fit with the shared tokens counted once. An epoch then
    has fewer steps, and the gradients of a step are more alike. Needs share_prefixes."""
    shuffle: bool = True
    limit: int | None = None
    """Use only this many samples, from the first on."""

    def __post_init__(self) -> None:
        _positive(self, "seq_length", "limit")
        if self.group_prefixes and not (self.share_prefixes and self.packing):
            raise ConfigError(
                "group_prefixes fills rows by what their samples share; set share_prefixes=true and packing=true "
                "with it"
            )


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Stage 0: which positions get a candidate set, and how large it is (METHOD: paper section 2).

    `tau`, `k_max` and `min_set_size` are those of `CandidateRule`.
    """

    store: str = ""
    tau: float = CandidateRule.tau
    k_max: int = CandidateRule.k_max
    min_set_size: int = CandidateRule.min_set_size
    stop_token: bool = False
    """Keep the tokens that end an answer in every set, beyond the paper's rule. Else the end of each answer raises
    their probability, and nothing in Stage 1 lowers it where an answer is to go on: answers may then stop too early."""
    strategy: Literal["all", "random", "last", "bucket"] = "bucket"
    fraction: float = 0.5
    """Share of the target positions to keep (random, bucket)."""
    buckets: int = 5
    bucket_samples: int = 1024
    """The bucket edges are quantiles of the confidence over this many samples, drawn with the run's seed and passed
    through first."""
    logits: Literal["none", "fp16", "bf16"] = "none"
    """Also store the base model's logits of the kept tokens."""
    codec: Literal["zd", "raw"] = "zd"
    chunk_rows: int = 256
    """Logits exist for this many positions at a time."""

    def __post_init__(self) -> None:
        if not 1 <= self.k_max <= 65_534:
            raise ConfigError(f"k_max must lie in 1..65534 (a set holds k_max ids and the gold one), got {self.k_max}")
        self.rule()
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction is a share in (0, 1], got {self.fraction}")
        _positive(self, "buckets", "bucket_samples", "chunk_rows")

    def rule(self, always: tuple[int, ...] = ()) -> CandidateRule:
        """The rule of these settings, and of the ids that are to be in every set."""
        return CandidateRule(tau=self.tau, k_max=self.k_max, min_set_size=self.min_set_size, always=always)


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Texts that the base model writes, and to whose stored distributions it is held while it learns: the loss is the
    domain's mean plus `weight` times the mean of KL(base || model) over the texts."""

    path: str = ""
    """Folder of the texts and their sets: `collect` makes it and `train` mixes them in. Empty: no rehearsal."""
    source: tuple[Literal["chat", "free", "prompts", "text"], ...] = ()
    """How a text begins. chat: the model writes a request and its answer, in its chat template. free: it writes from
    nothing. prompts: it answers those of `file`. text: the texts of `file` are taken as they are. Several take turns.
    When unset: chat, or free for a model without a chat template."""
    file: str = ""
    """Data file of the prompts or texts (formats of `data`)."""
    samples: int = 512
    """Texts to write; `text` takes all of the file, up to this many."""
    max_new_tokens: int = 128
    """Most tokens of a text, and of the request in front of an answer."""
    temperature: float = 1.0
    """Temperature of sampling; 1 is the model's own distribution, which the loss is about."""
    batch: int = 16
    """Texts written at a time by a replica."""
    tau: float = 0.99
    """Like collect.tau, of the sets of texts and prompts; so are `k_max` and `logits`."""
    k_max: int = 64
    logits: Literal["fp16", "bf16"] = "fp16"
    weight: float = 1.0
    """Factor of the texts' loss."""
    share: float = 0.2
    """Tokens of rehearsal in a step, as a share of the domain's."""
    every: int = 1
    """Rehearse in every n-th step only."""
    loss: str = field(default="kl", metadata={"registered": "parallel/losses"})
    """The loss at the texts and prompts. kl: KL(base || model) over each set; kl_rest: the probability outside it too,
    by the full logits of some positions at a time; full: cross-entropy on the texts, which needs no sets."""
    prompts: float = 0.0
    """Factor of the loss at the positions of the domain's own prompts; 0: none. They share the domain's forward
    pass."""
    fraction: float = 0.25
    """Share of the prompts' positions that get a set."""

    def __post_init__(self) -> None:
        _positive(self, "samples", "max_new_tokens", "batch", "every", "share", "temperature")
        self.rule()
        for name in ("weight", "prompts"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is a factor of a loss, at least 0, got {getattr(self, name)}")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction is a share in (0, 1], got {self.fraction}")
        needing = [kind for kind in self.source if kind in ("prompts", "text")]
        if needing and not self.file:
            raise ConfigError(f"source={needing[0]} takes its {needing[0]} from file, which is not set")

    def rule(self) -> CandidateRule:
        return CandidateRule(tau=self.tau, k_max=self.k_max)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Stage 1: the loop around the loss."""

    loss: str = field(default="restricted", metadata={"registered": "parallel/losses"})
    store: str = ""
    """The candidate store of `loss: restricted`; with `loss: full` a store, when given, still says which positions
    count."""
    iters: int | None = None
    """Optimizer steps; when unset, `epochs` passes over the data."""
    epochs: float = 1.0
    save: str = ""
    save_interval: int | None = None
    """Steps between checkpoints; one is always written at the end."""
    load: str = ""
    """Resume from this checkpoint folder (its latest iteration), whatever layout wrote it."""
    log_interval: int = 1
    tensorboard: bool = True
    profile: tuple[int, ...] = ()
    """First and last step, counted from this run's beginning, of which each rank writes a chrome trace; --profile: [2,
    4]."""
    max_skipped: int = 10
    """Stop after this many steps in a row whose gradient was not finite."""
    freeze_share: float = 0.0
    """Half fine-tuning: this share of each layer's tensors (0.5: half), drawn with the run's seed, is not trained; 0:
    train all."""

    def __post_init__(self) -> None:
        _positive(self, "iters", "epochs", "save_interval", "log_interval", "max_skipped")
        if self.profile and not (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]):
            raise ConfigError(
                f"profile is the first and the last step to trace, such as [2, 4], got {list(self.profile)}"
            )
        if not 0 <= self.freeze_share < 1:
            raise ConfigError(
                f"freeze_share is the share of the tensors that stays as it is, in [0, 1), got {self.freeze_share}"
            )


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """LoRA: the model stays as it is, low-rank factors beside its matrices are trained, y = W x + (alpha / rank) B A
    x."""

    rank: int = 0
    """Rows of A and columns of B; 0: no adapter, train the model itself."""
    alpha: float = 32.0
    targets: tuple[Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], ...] = (
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    )
    """Matrices of every layer that get one: linear_qkv, linear_proj (attention), linear_fc1, linear_fc2 (MLP)."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"rank must be at least 1, or 0 for no adapter, got {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"alpha must be a number above 0, got {self.alpha}")
        if not self.targets:
            raise ConfigError("targets is empty; name at least one matrix, or set rank=0 to train without an adapter")
        if len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"targets names a matrix twice: {', '.join(self.targets)}; name each once")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Name, learning rate and weight decay; every further key goes to the optimizer, which checks it
    (`optimizer.max_angle=60`)."""

    name: str = "moclip"
    lr: float = 1.25e-6
    betas: tuple[float, ...] | None = None
    """Decay rates of the optimizer's moments; when unset its own default, which is [0.9, 0.95] for those with Adam's
    two moments."""
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    options: dict[str, Any] = field(default_factory=dict, metadata={"rest": True})

    def __post_init__(self) -> None:
        if not self.lr >= 0:
            raise ConfigError(f"lr must be at least 0, got {self.lr}")
        if self.betas is not None and (len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas)):
            raise ConfigError(f"betas are two numbers in [0, 1), got {list(self.betas)}")
        if not self.clip_grad >= 0:
            raise ConfigError(f"clip_grad must be at least 0, got {self.clip_grad}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over the run: linear warm-up, then the style down to min_lr."""

    style: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_iters: int = 0
    min_lr: float = 1.25e-7


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the model lies on the ranks; data parallelism is what remains of the world."""

    tensor: int = 1
    pipeline: int = 1
    split: tuple[int, ...] | None = None
    """Layers of each pipeline stage; when unset the layers are spread evenly, the first stages taking the remainder."""
    sequence_parallel: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    zero1: bool = True
    """Shard the optimizer state over the data-parallel ranks."""
    head_multiple: int = 1
    """Pad the key/value heads with zero heads up to a multiple of this, so that tensor parallelism divides them; exact,
    undone on export."""
    stripe: bool | None = None
    """Deal the vocabulary's rows out in stripes, so that every tensor rank holds its share of the frequent tokens;
    exact, undone on export. When unset: where layout.tensor is above 1."""

    def __post_init__(self) -> None:
        _positive(self, "tensor", "pipeline", "head_multiple")

    @property
    def striped(self) -> bool:
        """True where vocabulary rows lie in stripes."""
        return self.tensor > 1 if self.stripe is None else self.stripe


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows per forward pass of one rank, and rows per optimizer step of the whole run."""

    micro: int = 1
    total: int = 16

    def __post_init__(self) -> None:
        _positive(self, "micro", "total")
        if self.total % self.micro:
            raise ConfigError(f"batch.total ({self.total}) must be a multiple of batch.micro ({self.micro})")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What to measure; each part runs when its file is given."""

    base: str = ""
    """Hugging Face folder of the base model, for the relative L2 distance."""
    text: str | dict[str, str] = ""
    """Plain text for perplexity: a file, or jsonl with a document in each line's `text`. Several, separated by commas,
    are measured each apart under the file's name; `text.NAME=FILE` chooses the names."""
    text_chars: int | None = None
    """Read only this many characters of each text."""
    text_tokens: int | None = None
    """Read only this many tokens of each document."""
    window: int = 512
    """Perplexity windows of this many tokens, each predicting all but its first."""
    stride: int | None = None
    """Sliding windows: each begins this many tokens after the one before and predicts only what that did not; unset:
    windows do not overlap, and the first token of each is not predicted."""
    targets: str | dict[str, str] = ""
    """Data sets (formats of `data`) whose target tokens' NLL is measured; several as in `text`. A folder of rehearsal
    texts is the base model's own kind of text."""
    choice: str | dict[str, str] = ""
    """Multiple choice by likelihood: jsonl with question, choices, answer (index or letter), or files or a folder of
    MMLU, MMLU-Pro, GPQA or TeleQnA; several as in `text`."""
    choice_answers: Literal["letters", "text"] = "letters"
    """letters: the prompt lists the choices and their letters are scored; text: the choices' own texts are."""
    generation: str | dict[str, str] = ""
    """Questions answered by greedy generation: files or a folder of GSM8K, MATH or BIG-Bench Hard; several as in
    `text`."""
    style: Literal["plain", "chat"] = "plain"
    """How questions of `choice` and `generation` are put: as plain text, or as a user's turn of the chat template."""
    shots: int = 0
    """Examples before each question of `choice` and `generation`, from its own subject."""
    examples: str | dict[str, str] = ""
    """Where examples come from; unset: the first questions of each subject, which are then not asked.
    `examples.NAME=FILE` where the questions have names."""
    lm_eval: str = ""
    """Tasks of lm-evaluation-harness, separated by commas, with its own prompts; needs the extra `eval`. `style`,
    `shots` (0: the task's own number) and `limit` (the first questions of each task) apply."""
    lm_eval_tasks: str = ""
    """Folder with YAML files of such tasks; unset: those that come with it."""
    nl2sql: str = ""
    """jsonl with db_id, query and a prompt in any data format."""
    databases: str = ""
    """Folder of SQLite files: <db_id>.sqlite, or <db_id>/*.sqlite, where several are a test suite."""
    sql_rule: Literal["spider", "bird", "strict"] = "spider"
    """When two results are the same: spider (as its test-suite script has it: any order of columns, DISTINCT aside),
    bird (equal sets of rows) or strict (columns in order, rows as often)."""
    sql_rows: int = 10_000
    """A query with more rows fails."""
    sql_seconds: float = 5.0
    """A query that takes longer fails."""
    limit: int | None = None
    """Measure only this many samples of each data set: the first, and of `choice` and `generation` evenly spaced
    ones."""
    max_new_tokens: int = 128
    batch: int = 16
    output: str = ""
    """Write the result here as JSON, and beside it NAME.questions.jsonl with a line for each question."""

    def __post_init__(self) -> None:
        _positive(self, "text_chars", "text_tokens", "limit", "max_new_tokens", "batch", "sql_rows", "sql_seconds")
        if self.shots < 0:
            raise ConfigError(f"shots is a number of examples, at least 0, got {self.shots}")
        if not math.isfinite(self.sql_seconds):
            raise ConfigError(
                f"sql_seconds is the time limit of a query, got {self.sql_seconds}; give a number of seconds"
            )
        if self.window < 2:
            raise ConfigError(f"window must be at least 2 tokens, got {self.window}")
        if self.stride is not None and not 1 <= self.stride < self.window:
            raise ConfigError(f"stride lies in 1..{self.window - 1}, below window={self.window}, got {self.stride}")


@dataclass(frozen=True, kw_only=True)
class Generate:
    prompt: str = ""
    raw: bool = False
    """Feed the prompt as it stands, without the chat template."""
    max_new_tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class Average:
    """Weights between a base model and the mean of models trained from it: base + alpha (mean - base)."""

    alpha: float = 0.85
    """1 is the trained model, 0 the base; 0.85 takes 15 % of the way back."""
    output: str = ""
    """Write a Hugging Face folder here."""
    sweep: tuple[float, ...] = ()
    """Evaluate at each of these alphas by the `evaluate` section and show them side by side; `evaluate.output` takes
    the results."""

    def __post_init__(self) -> None:
        for alpha in (self.alpha, *self.sweep):
            if not math.isfinite(alpha):
                raise ConfigError(f"alpha must be a finite number, got {alpha}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    model: str = ""
    """A Hugging Face folder (config.json, safetensors, tokenizer) or a checkpoint folder written by `train` or
    `convert`."""
    tokenizer: str = ""
    """Folder of the tokenizer, when it is not the model's."""
    output: str = "runs/replay"
    """Logs, metrics and the resolved configuration go here."""
    seed: int = 42
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """auto: bf16 with fp32 main weights on devices that have it, fp32 on cpu; fp64: cpu only, for checking one layout
    against another."""
    kernels: Literal["auto", "reference"] = "auto"
    data: Data = field(default_factory=Data)
    collect: Collect = field(default_factory=Collect)
    rehearsal: Rehearsal = field(default_factory=Rehearsal)
    train: Train = field(default_factory=Train)
    adapter: Adapter = field(default_factory=Adapter)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    layout: Layout = field(default_factory=Layout)
    batch: Batch = field(default_factory=Batch)
    evaluate: Evaluate = field(default_factory=Evaluate)
    average: Average = field(default_factory=Average)
    generate: Generate = field(default_factory=Generate)

    def __post_init__(self) -> None:
        if self.adapter.rank and self.train.freeze_share:
            raise ConfigError(
                f"adapter.rank={self.adapter.rank} freezes the whole model, so "
                f"train.freeze_share={self.train.freeze_share} has nothing to "
                "choose from; set one of them to 0"
            )
