"""Every change we make to megatron-core's surroundings, in one table: what, where it is needed, why, and for which
versions.

megatron-core names CUDA in literals. On the cpu those names must lead to the cpu; on the NPU an adapter does that:
MindSpeed or MegatronAdaptor where one made for this megatron-core is installed, else torch-npu's own `transfer_to_npu`
and the NPU's part of this table. Importing this module changes nothing: `install` does, once per process, and only
processes that run a model call it. `tests/ranks/test_shims.py` runs training without each shim of the cpu in turn,
tests/npu without each of the NPU, and they fail when one is not needed any more.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import queue
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_replay.device import Device, fused_operator
from megatron_replay.errors import DeviceError
from megatron_replay.parallel.shims.npu_arguments import rotary

log = logging.getLogger(__name__)
_CPU = torch.device("cpu")
_installed: list[str] = []


@dataclass(frozen=True)
class Shim:
    name: str
    where: str
    """The megatron-core code that needs it."""
    why: str
    versions: str
    """Of megatron-core; elsewhere the shim is not applied."""
    apply: Callable[[], None]


@dataclass(frozen=True)
class Adapter:
    """What leads megatron's CUDA names to the NPU. It is imported before megatron.core, of which it replaces parts."""

    name: str
    module: str
    package: str = ""
    """As pip knows it; its version is that of the megatron-core it is made for (0.12.1 of MindSpeed 26.1.0)."""


NONE = Adapter("none", "torch_npu.contrib.transfer_to_npu")
ADAPTERS = (
    Adapter("mindspeed", "mindspeed.megatron_adaptor", "mindspeed"),
    Adapter("megatron_adaptor", "megatron_adaptor", "megatron-adaptor"),
)


def import_megatron() -> None:
    """Import the parts of megatron-core we use, with `torch.compile` standing still meanwhile.

    megatron decorates about 35 helpers with torch.compile at import: that loads dynamo and inductor, 4-5 s in every
    process, and on the cpu gains nothing.
    """
    _quiet()
    real = torch.compile
    torch.compile = _no_compile  # type: ignore[assignment]
    try:
        for name in (
            "models.gpt",
            "optimizer",
            "distributed",
            "pipeline_parallel",
            "dist_checkpointing",
            "transformer.transformer_block",
        ):
            importlib.import_module(f"megatron.core.{name}")
    finally:
        torch.compile = real


def install(device: Device, *, skip: Collection[str] = ()) -> list[str]:
    """Apply the shims of `device`; returns their names. A second call changes nothing.

    skip: names left out, for the test that shows each is needed.
    """
    if _installed:
        return list(_installed)
    chosen, _ = adapter(device)
    if device.name == "npu":
        _adapt(chosen)
    _quiet()
    if device.name in ("cpu", "npu"):
        import_megatron()
    for shim in table(device, adapter=chosen):
        if shim.name not in skip:
            shim.apply()
            _installed.append(shim.name)
    return list(_installed)


def table(device: Device, version: str | None = None, adapter: Adapter = NONE) -> list[Shim]:
    """The shims `install` applies on this device with this megatron-core, by default the imported one."""
    here = version or megatron_version()
    return [shim for shim in catalog(device, adapter) if within(here, shim.versions)]


def catalog(device: Device, adapter: Adapter = NONE) -> list[Shim]:
    """The shims of this device for all versions of megatron-core; MindSpeed and MegatronAdaptor bring some of the NPU's
    themselves."""
    if device.name == "cpu":
        return [*_CPU_SHIMS, *_COMMON_SHIMS]
    if device.name == "npu":
        return [*(_NPU_SHIMS if adapter == NONE else ()), *_NPU_ALWAYS, *_COMMON_SHIMS]
    return list(_COMMON_SHIMS)


def megatron_version() -> str:
    """Of the megatron-core that is imported, which need not be the one pip knows of."""
    return str(importlib.import_module("megatron.core").__version__)


def within(version: str, versions: str) -> bool:
    """Whether a version, of which the first two numbers count, is in a range such as ">=0.12,<0.15"."""
    low, high = (_numbers(bound) for bound in versions.split(","))
    return low <= _numbers(version) < high


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def adapter(device: Device) -> tuple[Adapter, list[str]]:
    """What leads megatron's CUDA names to this device, and why not another adapter that is installed.

    Chosen is the first of ADAPTERS that is made for the megatron-core that is here: its first two numbers. Nothing is
    imported.
    """
    core, chosen, notes = _core_version(), NONE, []
    for candidate in ADAPTERS:
        version = _package_version(candidate)
        unused = f"{candidate.package} {version} is installed and not used"
        if version is None:
            if importlib.util.find_spec(candidate.module.partition(".")[0]) is not None:
                notes.append(
                    f"{candidate.package} is here and not used: pip does not know its version; install it with pip "
                    "install -e"
                )
        elif device.name != "npu" or chosen != NONE:
            notes.append(unused)
        elif core is None or _numbers(version) != _numbers(core):
            notes.append(f"{unused}: it is made for megatron-core {version}, here is {core or 'none'}")
        else:
            chosen = candidate
    return chosen, notes


def _package_version(adapter: Adapter) -> str | None:
    try:
        return importlib.metadata.version(adapter.package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _core_version() -> str | None:
    """Of the megatron-core that would be imported, without importing it: what it says itself, since a checkout has no
    metadata."""
    spec = importlib.util.find_spec("megatron.core") if importlib.util.find_spec("megatron") else None
    if spec is None or spec.origin is None:
        return None
    info = Path(spec.origin).with_name("package_info.py")
    return str(runpy.run_path(str(info))["__version__"]) if info.is_file() else None


def _adapt(adapter: Adapter) -> None:
    """Import it, before megatron.core and with the command line out of its sight: MindSpeed reads options there. Raises
    DeviceError."""
    if "megatron.core" in sys.modules:
        raise DeviceError(
            f"megatron.core was imported before {adapter.module}, which must come first; import megatron_replay first"
        )
    words, sys.argv = sys.argv, sys.argv[:1]
    try:
        importlib.import_module(adapter.module)
    except Exception as err:
        cause = f"{type(err).__name__}: {' '.join(str(err).split())}"
        way_out = "install torch-npu again" if adapter == NONE else f"repair or uninstall {adapter.package}"
        raise DeviceError(f"{adapter.module} cannot be imported ({cause}); {way_out}") from err
    finally:
        sys.argv = words
    log.info("adapter between megatron-core and the NPU: %s", adapter.name)


def _quiet() -> None:
    """Leave out what a user can do nothing about: megatron's calls of what torch calls outdated, and, told by every
    rank at import, that apex and transformer-engine are missing (`doctor` tells that once)."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    for module in (r"megatron\.", r"torch\.distributed\."):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


def _no_compile(function: Any = None, *_: Any, **__: Any) -> Any:
    return function if callable(function) else (lambda inner: inner)


def _current_device() -> None:
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]


def _factories() -> None:
    def redirect(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = _CPU
            return factory(*args, **kwargs)

        return on_cpu

    for name in ("zeros", "empty", "tensor"):
        setattr(torch, name, redirect(getattr(torch, name)))


def _synchronize() -> None:
    torch.cuda.synchronize = lambda *_: None


def _rng() -> None:
    """The cpu's default generator plays the device generator."""
    tp_random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    generator = torch.default_generator
    torch.cuda.get_rng_state = lambda device="cuda": generator.get_state()
    torch.cuda.manual_seed = generator.manual_seed  # type: ignore[assignment]
    tp_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: generator.set_state(state)
    tp_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: generator.get_state()

    @contextlib.contextmanager
    def fork(self: Any, name: str = tp_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        outer = generator.get_state()
        generator.set_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = generator.get_state()
            generator.set_state(outer)

    tp_random.CudaRNGStatesTracker.fork = fork


def _tensor_cuda() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _tensor_type() -> None:
    plain = torch.Tensor.type

    def named_as_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = plain(self, *args, **kwargs)
        return "torch.cuda." + name.rpartition(".")[2] if isinstance(name, str) else name

    torch.Tensor.type = named_as_cuda  # type: ignore[method-assign, assignment]


def _capability() -> None:
    torch.cuda.get_device_capability = lambda device=None: (0, 0)


def _rotary() -> None:
    rope: Any = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
    rope._apply_rotary_pos_emb_bshd = rotary(rope._apply_rotary_pos_emb_bshd, fused_operator)


def _group_step() -> None:
    module: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    if not module.HAVE_APEX_OR_TE:
        module.HAVE_APEX_OR_TE = module.USING_APEX_OPTIMIZER = True


def _results_queue() -> None:
    module: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    results: queue.Queue[Any] = queue.Queue()
    module._get_write_results_queue = lambda: results


def _save_here() -> None:
    module: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.base")

    def save(self: Any, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        request = self.async_save(sharded_state_dict, checkpoint_dir)
        arguments = list(request.async_fn_args)
        if request.preload_fn is not None:
            arguments[1] = request.preload_fn()  # tensors of a device, copied to the host
        request._replace(async_fn_args=tuple(arguments)).execute_sync()

    module.AsyncSaveShardedStrategy.save = save


def _write_format() -> None:
    filesystem: Any = importlib.import_module("torch.distributed.checkpoint.filesystem")
    module: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    if "serialization_format" in inspect.signature(module._write_item).parameters:
        module._write_item = functools.partial(
            module._write_item, serialization_format=filesystem.SerializationFormat.TORCH_SAVE
        )


def _no_fp8() -> None:
    module: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    plain = module.quantize_param_shard

    def if_any(model_params: Any, *args: Any, **kwargs: Any) -> None:
        if len(model_params) > 0:
            plain(model_params, *args, **kwargs)

    module.quantize_param_shard = if_any


def _frozen_embedding() -> None:
    module: Any = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    plain, inside = module._allreduce_word_embedding_grads, module.get_attr_wrapped_model

    def unless_frozen(model: Any, *args: Any, **kwargs: Any) -> None:
        weight = inside(model[0], "shared_embedding_or_output_weight")()
        if weight is None or weight.requires_grad:
            plain(model, *args, **kwargs)

    module._allreduce_word_embedding_grads = unless_frozen


_ALL = ">=0.12,<0.17"
_COMMON_SHIMS = [
    Shim(
        "group_step",
        "optimizer/distrib_optimizer.py",
        "without apex it reads the step count of torch's AdamW from each parameter; ours counts in the parameter "
        "group, as apex does",
        _ALL,
        _group_step,
    ),
    Shim(
        "results_queue",
        "dist_checkpointing/strategies/filesystem_async.py",
        "every rank starts a manager process for one result, which outlives the rank and holds its output open; we "
        "save synchronously, "
        "where a queue inside the process does",
        _ALL,
        _results_queue,
    ),
    Shim(
        "save_here",
        "dist_checkpointing/strategies/base.py",
        "a synchronous save forks a process that writes, whose result never comes to a queue inside this one",
        ">=0.12,<0.15",
        _save_here,
    ),
    Shim(
        "write_format",
        "dist_checkpointing/strategies/filesystem_async.py",
        "it writes by a private function of torch, which since torch 2.7 must be told the format",
        ">=0.12,<0.13",
        _write_format,
    ),
    Shim(
        "frozen_embedding",
        "distributed/finalize_model_grads.py",
        "the gradient of an embedding tied to the head of another stage is reduced, though beside an adapter it is "
        "frozen and has none",
        ">=0.12,<0.13",
        _frozen_embedding,
    ),
    Shim(
        "no_fp8",
        "optimizer/distrib_optimizer.py, fp8_utils.py",
        "without transformer-engine ZeRO-1 raises where it would quantize parameters to fp8, though there are none",
        ">=0.12,<0.13",
        _no_fp8,
    ),
]
_TENSOR_TYPE = Shim(
    "tensor_type",
    "optimizer/optimizer.py, distrib_optimizer.py",
    "parameters are sorted by comparing param.type() with 'torch.cuda.FloatTensor'",
    _ALL,
    _tensor_type,
)
_NPU_SHIMS = [_TENSOR_TYPE]
_NPU_ALWAYS = [
    Shim(
        "capability",
        "distributed/finalize_model_grads.py",
        "its broadcast: torch's asks tensors that say they are CUDA's for a capability, which transfer_to_npu leaves "
        "None",
        _ALL,
        _capability,
    ),
    Shim(
        "rotary",
        "models/common/embeddings/rope_utils.py",
        "five elementwise operators a rotation; the NPU has one (megatron knows transformer-engine's only)",
        _ALL,
        _rotary,
    ),
]
_CPU_SHIMS = [
    Shim(
        "current_device",
        "tensor_parallel/layers.py, p2p_communication.py, param_and_grad_buffer.py",
        "device=torch.cuda.current_device() raises without CUDA",
        _ALL,
        _current_device,
    ),
    Shim(
        "factories",
        "pipeline_parallel/schedules.py, optimizer/optimizer.py",
        "torch.zeros(..., device='cuda') and its like are literals",
        _ALL,
        _factories,
    ),
    Shim(
        "synchronize",
        "pipeline_parallel/p2p_communication.py",
        "torch.cuda.synchronize() after batched sends raises without CUDA",
        _ALL,
        _synchronize,
    ),
    Shim(
        "rng",
        "tensor_parallel/random.py",
        "model_parallel_cuda_manual_seed asks CUDA; _set_cuda_rng_state queues a CUDA call that never runs, so "
        "dropout would silently not "
        "be forked",
        _ALL,
        _rng,
    ),
    Shim(
        "tensor_cuda",
        "models/common/language_module/language_module.py",
        "weight.data.cuda() of tied embeddings on two pipeline stages",
        _ALL,
        _tensor_cuda,
    ),
    _TENSOR_TYPE,
]
