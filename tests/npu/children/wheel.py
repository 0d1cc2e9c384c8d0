"""The names in our code (given as JSON) that the wheel has, and our device seam's view of the wheel."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from typing import Any

import torch

from megatron_replay import device
from megatron_replay.doctor.operators import runs_on
from megatron_replay.kernels import library
from megatron_replay.parallel.shims import fused_arguments as fused

asked: dict[str, list[str]] = json.loads(sys.argv[1])


def refused(operation: Any) -> str:
    try:
        operation()
    except RuntimeError as err:
        return str(err)
    return ""


def on_meta() -> dict[str, Any]:
    """The fused operators' own meta kernels, called with our arguments."""
    meta = {"device": "meta", "dtype": torch.bfloat16}
    q, k, x = torch.empty(10, 4, 16, **meta), torch.empty(10, 2, 16, **meta), torch.empty(10, 1, 64, **meta)
    angles = torch.empty(10, 1, 1, 16, **meta)
    within = fused.causal_within(torch.tensor([[0, 4], [4, 6]]), q, None)
    few, more = torch.empty(3, 4, 16, **meta), torch.empty(7, 2, 16, **meta)
    masked = fused.to_visible(torch.ones(3, 7, dtype=torch.bool), few, None)
    ops = torch.ops.npu
    return {
        "npu_fusion_attention": list(ops.npu_fusion_attention(q, k, k, **within)[0].shape),
        "npu_fusion_attention, masked": list(
            ops.npu_fusion_attention(few[None], more[None], more[None], **masked)[0].shape
        ),
        "npu_rms_norm": list(ops.npu_rms_norm(x, torch.empty(64, **meta), 1e-6)[0].shape),
        "npu_rotary_mul": list(ops.npu_rotary_mul(q[:, None], angles, angles).shape),
    }


here = device.available()
npu = here[0]
npu.select(0)
tensor = torch.arange(6.0).view(2, 3).to(npu.at())

print(
    json.dumps(
        {
            "version": importlib.metadata.version("torch-npu"),
            "devices": [found.name for found in here],
            "default": device.choose().name,
            "precision": str(device.dtype("auto", npu)),
            "count": npu.count(),
            "model": npu.model_name(),
            "memory": npu.memory(),
            "peak": npu.peak_memory(),
            "tensor": [str(tensor.device), tensor.view(3, 2).cpu().tolist()],
            "attributes": [name for name in asked["attributes"] if not hasattr(torch.npu, name)],
            "operators": [name for name in asked["operators"] if not hasattr(torch.ops.npu, name)],
            "differentiable": [
                name
                for name in asked["operators"]
                if not torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "AutogradPrivateUse1")
            ],
            "modules": [name for name in asked["modules"] if importlib.util.find_spec(name) is None],
            "meta": on_meta(),
            "ours": library.live("npu"),
            "places": {
                name: runs_on(name, "npu")
                for name in ("aten::add.Tensor", "aten::index_add_", "aten::detach", "aten::segment_reduce")
            },
            "add": refused(lambda: tensor + tensor),
            "second device": refused(lambda: torch.npu.set_device(1)),
        }
    )
)
