"""The patches themselves: each function replaces a name of torch or megatron-core when it is called.

`entries` says which patch is needed where, why, and for which versions.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import queue
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_replay.device import fused_operator
from megatron_replay.parallel.shims.fused_arguments import rotary as fused_rotary

_CPU = torch.device("cpu")


def current_device() -> None:
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]


def factories() -> None:
    def redirect(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = _CPU
            return factory(*args, **kwargs)

        return on_cpu

    for name in ("zeros", "empty", "tensor"):
        setattr(torch, name, redirect(getattr(torch, name)))


def synchronize() -> None:
    torch.cuda.synchronize = lambda *_: None


def rng() -> None:
    """The CPU's default generator stands in for the device's."""
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


def tensor_cuda() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def tensor_type() -> None:
    plain = torch.Tensor.type

    def named_as_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = plain(self, *args, **kwargs)
        return "torch.cuda." + name.rpartition(".")[2] if isinstance(name, str) else name

    torch.Tensor.type = named_as_cuda  # type: ignore[method-assign, assignment]


def capability() -> None:
    torch.cuda.get_device_capability = lambda device=None: (0, 0)


def rotary() -> None:
    rope: Any = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
    rope._apply_rotary_pos_emb_bshd = fused_rotary(rope._apply_rotary_pos_emb_bshd, fused_operator)


def group_step() -> None:
    module: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    if not module.HAVE_APEX_OR_TE:
        module.HAVE_APEX_OR_TE = module.USING_APEX_OPTIMIZER = True


def results_queue() -> None:
    module: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    results: queue.Queue[Any] = queue.Queue()
    module._get_write_results_queue = lambda: results


def save_here() -> None:
    module: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.base")

    def save(self: Any, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        request = self.async_save(sharded_state_dict, checkpoint_dir)
        arguments = list(request.async_fn_args)
        if request.preload_fn is not None:
            arguments[1] = request.preload_fn()  # tensors of a device, copied to the host
        request._replace(async_fn_args=tuple(arguments)).execute_sync()

    module.AsyncSaveShardedStrategy.save = save


def write_format() -> None:
    filesystem: Any = importlib.import_module("torch.distributed.checkpoint.filesystem")
    module: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    if "serialization_format" in inspect.signature(module._write_item).parameters:
        module._write_item = functools.partial(
            module._write_item, serialization_format=filesystem.SerializationFormat.TORCH_SAVE
        )


def no_fp8() -> None:
    module: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    plain = module.quantize_param_shard

    def if_any(model_params: Any, *args: Any, **kwargs: Any) -> None:
        if len(model_params) > 0:
            plain(model_params, *args, **kwargs)

    module.quantize_param_shard = if_any


def frozen_embedding() -> None:
    module: Any = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    plain, inside = module._allreduce_word_embedding_grads, module.get_attr_wrapped_model

    def unless_frozen(model: Any, *args: Any, **kwargs: Any) -> None:
        weight = inside(model[0], "shared_embedding_or_output_weight")()
        if weight is None or weight.requires_grad:
            plain(model, *args, **kwargs)

    module._allreduce_word_embedding_grads = unless_frozen
