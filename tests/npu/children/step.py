# ruff: noqa: E402 (the extension must be there before the package looks for it)
"""The operators of `doctor --ops` and the steps they belong to, on one device: cpu, or npu:0 with the host's
arithmetic.

The runs of the precisions compute each sample by itself; "tree", in fp32, shares what they begin with. HCCL is not
here: a process group of one runs over gloo. Arguments: device, precisions (fp32,bf16), shim to leave out, compiled
extension; "" for none.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from extension import load

name, precisions, without, extension = sys.argv[1:]
if extension:
    load(extension)

from megatron_replay import device
from megatron_replay.config import Data, RunConfig
from megatron_replay.doctor import operators
from megatron_replay.kernels import library
from megatron_replay.parallel import shims
from megatron_replay.parallel.ranks import world

where = dataclasses.replace(device.choose(name), backend="gloo")
keep: Any = None
if name == "npu":
    from hostmath import HostMath, serve_the_binding

    seen: operators.Seen = HostMath()
    keep = serve_the_binding() if extension else None
else:
    seen = operators.Seen()
if without:
    install = shims.install
    world.shims.install = lambda device: install(device, skip={without})  # type: ignore[assignment]
with seen:
    runs = {
        precision: operators.steps(RunConfig(device=name, precision=precision), where)
        for precision in precisions.split(",")
    }
    runs["tree"] = operators.steps(RunConfig(device=name, precision="fp32", data=Data(share_prefixes=True)), where)
print(
    json.dumps(
        {
            "steps": {precision: [dataclasses.asdict(step) for step in steps] for precision, steps in runs.items()},
            "places": seen.by_device(),
            "ours": library.live(name),
        }
    )
)
