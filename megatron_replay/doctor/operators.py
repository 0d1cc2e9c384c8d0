"""The operators that Stage 0 and training call, and where each runs.

`doctor --ops` runs them on a tiny model and lists what it saw. An operator without a kernel for the device runs on the
CPU, and its tensors are copied there and back. Nothing else reports that; in the list it stands under "cpu instead of
...".
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_replay.candidates import CandidateRule
from megatron_replay.config import Layout, RunConfig
from megatron_replay.data.prefixes import SHORTEST, lay
from megatron_replay.device import Device, dtype
from megatron_replay.kernels import library
from megatron_replay.kernels.schemas import OPERATORS
from megatron_replay.models.spec import ModelSpec
from megatron_replay.parallel.batch import flatten
from megatron_replay.parallel.losses.restricted import Restricted
from megatron_replay.parallel.mcore.model import build
from megatron_replay.parallel.pipeline import forward
from megatron_replay.parallel.ranks import world
from megatron_replay.parallel.selection import Selection
from megatron_replay.parallel.trainer import StepResult, make_trainer

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LENGTHS = (13, 7, 12)
"""Tokens of each sample of the one micro-batch, after a common prefix.

With `data.share_prefixes` the prefix is computed once.
"""
STEPS = 2
"""Steps of training. The first has no momentum yet."""


class Seen(TorchDispatchMode):
    """Count the operators that are called in a block, below autograd.

    Where none of our kernels is compiled, the operators that our reference calls are counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = device_type(args, kwargs)
        namespace, _, name = func._schema.name.partition("::")
        twin = OPERATORS[name].twin if namespace == library.NAMESPACE else None
        if twin and library.answering(name, device, "auto") == "reference":
            with self:
                return twin(*args, **kwargs)
        if not _has_kernel(func.name(), _key(device)) and _has_kernel(func.name(), "CompositeImplicitAutograd"):
            with self:  # it only stands for other operators, and those count
                return func.decompose(*args, **kwargs)
        self.calls[func.name(), device] += 1
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call the operator."""
        return func(*args, **kwargs)

    def by_device(self) -> dict[str, dict[str, int]]:
        """Device -> operator -> calls, the most called first."""
        found: dict[str, dict[str, int]] = {}
        for (name, device), calls in self.calls.most_common():
            found.setdefault(runs_on(name, device), {})[name] = calls
        return dict(sorted(found.items()))


def runs_on(operator: str, device_type: str) -> str:
    """The device on which an operator called with tensors of a device type runs.

    That is the device type, or "cpu instead of ..." where only torch's fallback answers.
    """
    rows = torch._C._dispatch_dump_table(operator).splitlines()
    answer = next((row for row in rows if row.startswith(f"{_key(device_type)}:")), "")
    served = answer and ("[backend fallback]" not in answer or "fallthrough" in answer)
    return device_type if served or device_type == "cpu" else f"cpu instead of {device_type}"


def steps(config: RunConfig, device: Device) -> list[StepResult]:
    """Select candidate sets with a tiny Qwen3 of random weights and train it on them, in one process on `device`."""
    spec, layout = ModelSpec.from_hf(TINY), Layout()
    torch.manual_seed(config.seed)
    with world.running(layout, device, seed=config.seed) as here:
        samples = _samples(spec.vocab_size, config.seed)
        length = sum(map(len, samples)) + 4
        model = build(spec, layout, here, dtype(config.precision, device), seq_length=length)
        with torch.no_grad():
            for _, _, parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.1 + (parameter.dim() == 1))
        tree = lay(samples, share_prefixes=config.data.share_prefixes)
        batch = flatten(samples, [np.arange(len(ids) - 1) for ids in samples], length, here.torch_device, tree=tree)
        rule = CandidateRule(tau=0.9, k_max=20)
        selection = Selection(model, rule, vocab_size=spec.vocab_size, chunk_rows=16, kernels=config.kernels)
        forward(model, [batch], selection, consume=lambda *_: None)
        sets = selection.take()
        trainer = make_trainer(model, config.optimizer, config.kernels)
        loss = Restricted(model, spec.vocab_size, config.kernels)
        return [
            trainer.step([replace(batch, sets=sets.local(loss.shard))], loss, config.optimizer.lr) for _ in range(STEPS)
        ]


def _samples(vocab: int, seed: int) -> list[np.ndarray]:
    beginning, *ends = (
        np.random.default_rng(seed + length).integers(0, vocab, length) for length in (SHORTEST, *LENGTHS)
    )
    return [np.concatenate([beginning, end]) for end in ends]


def _key(device_type: str) -> str:
    return library.DISPATCH_KEYS.get(device_type, "CPU")


def _has_kernel(operator: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator, key))


def device_type(args: Any, kwargs: Any) -> str:
    """The device type of the tensors and devices in a call's arguments: the accelerator's, where there is one."""
    leaves = tree_leaves((args, kwargs))
    types = [x.device.type for x in leaves if isinstance(x, Tensor)] + [
        x.type for x in leaves if isinstance(x, torch.device)
    ]
    return next((name for name in types if name != "cpu"), "cpu")
