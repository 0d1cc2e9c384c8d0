"""Each rule of the host stand-in is broken once, and obeyed once: docs/ascend-kernels.md lists them with their sources.

The snippets run on one core with:
- `in` and `out`: float, 1,024 elements each; `in` is read only;
- a pipe;
- queues `q` (VECIN, two buffers of 256 bytes) and `r` (VECOUT, two of 256);
- a VECCALC buffer `b` of 4,096 bytes and a VECIN buffer `d` of 1,024.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from stand_in import compile_

LOAD = "auto x = q.AllocTensor<float>(); DataCopy(x, in, 64); q.EnQue(x); x = q.DeQue<float>();"
BUF = "auto y = b.Get<float>(); Duplicate(y, 1.0f, 512); PipeBarrier<PIPE_V>();"
SEND = "auto z = r.AllocTensor<float>(); Duplicate(z, 2.0f, 64); r.EnQue(z); z = r.DeQue<float>();"
FREE_X, FREE_Z = "q.FreeTensor(x);", "r.FreeTensor(z);"

BROKEN = {
    # memory
    "buffer overflow": ("TBuf<TPosition::VECCALC> big; pipe.InitBuffer(big, 196608);", "the unified buffer overflows"),
    "a byte of overflow": (
        "TBuf<TPosition::VECCALC> big; pipe.InitBuffer(big, 196608 - 6144 + 1);",
        "the unified buffer overflows",
    ),
    "more than 64 buffers": (
        "TBuf<TPosition::VECCALC> t[61]; for (auto& one : t) pipe.InitBuffer(one, 32);",
        "a kernel may have 64",
    ),
    "no buffer": ("TBuf<TPosition::VECCALC> t; t.Get<float>();", "InitBuffer was not called"),
    "uninitialised memory": ("auto y = b.Get<float>(); Adds(y, y, 1.0f, 8);", "that nothing has written"),
    "a queue's buffer starts undefined": (
        LOAD + FREE_X + "x = q.AllocTensor<float>(); Adds(b.Get<float>(), x, 0.0f, 8);",
        "that nothing has written",
    ),
    "beyond a tensor": (BUF + "Adds(y, y, 1.0f, 1025);", "1025 elements of a tensor of 1024"),
    "an index beyond a tensor": ("auto y = b.Get<float>(); y[1025];", "LocalTensor[1025]"),
    "a value beyond a tensor": ("auto y = b.Get<float>(); y.SetValue(1024, 0.0f);", "SetValue(1024)"),
    "a repeat beyond a tensor": (
        "auto y = b.Get<float>(); Duplicate(y, 1.0f, 1024); PipeBarrier<PIPE_V>(); Mul(y[448], y[448], y, 64, 10, {1, "
        "1, 1, 8, 8, 0});",
        "lies beyond the tensor",
    ),
    "beyond a global tensor": (
        "auto x = q.AllocTensor<float>(); DataCopy(x, in[1016], 16);",
        "of a global tensor that has 32 left",
    ),
    "outside every argument": (
        "GlobalTensor<float> g; g.SetGlobalBuffer((float*)in_address + 1024, 64); auto x = q.AllocTensor<float>(); "
        "DataCopy(x, g, 8);",
        "outside every argument",
    ),
    "an argument that is only read": (SEND + "DataCopy(in, z, 8);", "that the kernel only reads"),
    # alignment and sizes
    "a vector operand's address": (BUF + "Adds(y[4], y, 1.0f, 8);", "not aligned to 32 bytes"),
    "a copy's address in the buffer": (
        "auto x = q.AllocTensor<float>(); DataCopy(x[4], in, 8);",
        "not aligned to 32 bytes",
    ),
    "a copy's address in global memory": (
        "auto x = q.AllocTensor<float>(); DataCopy(x, in[1], 8);",
        "global memory is not aligned",
    ),
    "a copy's size": ("auto x = q.AllocTensor<float>(); DataCopy(x, in, 9);", "36 bytes are no multiple of 32"),
    "a padded copy's address in the buffer": (
        SEND + "DataCopyPad(out, z[1], DataCopyExtParams{1, 4, 0, 0, 0});",
        "not aligned to 32 bytes",
    ),
    "a padded copy's elements": (SEND + "DataCopyPad(out, z, DataCopyExtParams{1, 6, 0, 0, 0});", "not whole elements"),
    "a padded copy's blocks": (SEND + "DataCopyPad(out, z, DataCopyExtParams{4096, 4, 0, 0, 0});", "4096 blocks"),
    "a padded copy's padding": (
        "auto x = q.AllocTensor<float>(); DataCopyPad(x, in, DataCopyExtParams{1, 32, 0, 0, 0}, "
        "DataCopyPadExtParams<float>{true, 0, 9, 0.0f});",
        "more than 32 bytes of padding",
    ),
    "copies to VECCALC": ("DataCopy(b.Get<float>(), in, 8);", "VECCALC is not a position"),
    "more than 255 repeats": (BUF + "WholeReduceSum(y, y, 1, 256, 0, 1, 0);", "256 repeats"),
    "a mask of more lanes than a repeat": (BUF + "WholeReduceSum(y, y, 65, 1, 1, 1, 8);", "a mask of 65 lanes"),
    "an empty mask": (BUF + "WholeReduceSum(y, y, 0, 1, 1, 1, 8);", "a mask of 0 lanes"),
    "a comparison of part of a repeat": (
        BUF + "CompareScalar(b.Get<uint8_t>()[3072], y, 0.0f, CMPMODE::GT, 65);",
        "no multiple of 256 bytes",
    ),
    "a gather's offset": (
        BUF + "auto o = d.Get<uint32_t>(); Duplicate(o, 2u, 8); PipeBarrier<PIPE_V>(); Gather(y[64], y, o, 0, 8);",
        "no multiple of 4",
    ),
    "a gather beyond its source": (
        BUF + "auto o = d.Get<uint32_t>(); Duplicate(o, 4096u, 8); PipeBarrier<PIPE_V>(); Gather(y[64], y, o, 0, 8);",
        "beyond the source",
    ),
    "operands that overlap in part": (BUF + "Adds(y[8], y, 1.0f, 64);", "overlap without being the same"),
    "a repeat that reads what the one before wrote": (
        BUF + "Mul(y[8], y, y, 8, 2, {1, 1, 1, 1, 1, 1});",
        "an earlier repeat of the same instruction",
    ),
    # types
    "arithmetic on bfloat16": (
        "auto y = b.Get<bfloat16_t>(); Duplicate(y, bfloat16_t{}, 16); PipeBarrier<PIPE_V>(); Add(y, y, y, 16);",
        "bfloat16 has no arithmetic",
    ),
    "narrowing without a rounding mode": (
        BUF + "Cast(d.Get<bfloat16_t>(), y, RoundMode::CAST_NONE, 16);",
        "needs a rounding mode",
    ),
    "widening with one": (
        "auto y = b.Get<bfloat16_t>(); Duplicate(y, bfloat16_t{}, 16); PipeBarrier<PIPE_V>(); Cast(d.Get<float>(), y, "
        "RoundMode::CAST_RINT, 16);",
        "takes CAST_NONE only",
    ),
    # queues
    "more tensors than buffers": (
        "q.AllocTensor<float>(); q.AllocTensor<float>(); q.AllocTensor<float>();",
        "all 2 buffers of the queue are in use",
    ),
    "an empty queue": ("q.DeQue<float>();", "the queue is empty"),
    "a queue deeper than its depth": (
        "auto x = q.AllocTensor<float>(); auto y = q.AllocTensor<float>(); DataCopy(x, in, 8); DataCopy(y, in, 8); "
        "q.EnQue(x); q.EnQue(y);",
        "the queue of depth 1 is full",
    ),
    "enqueued twice": (LOAD + "q.EnQue(x);", "not allocated from this queue"),
    "freed before it was dequeued": (
        "auto x = q.AllocTensor<float>(); q.FreeTensor(x);",
        "did not come out of this queue",
    ),
    "a tensor of another queue": (LOAD + "r.FreeTensor(x);", "a tensor of another queue"),
    "used after EnQue": (
        "auto x = q.AllocTensor<float>(); DataCopy(x, in, 64); q.EnQue(x); Adds(b.Get<float>(), x, 1.0f, 8);",
        "a stale tensor",
    ),
    "used after FreeTensor": (
        LOAD + "auto old = x; q.FreeTensor(x); Adds(b.Get<float>(), old, 1.0f, 8);",
        "a stale tensor",
    ),
    "never freed": (LOAD, "not freed"),
    "more than 8 tensors of a position": (
        "TQue<TPosition::VECIN, 1> many; pipe.InitBuffer(many, 9, 32); for (int i = 0; i < 9; ++i) "
        "many.AllocTensor<float>();",
        "more than 8 tensors of one position",
    ),
    # hazards
    "the vector reads what is still arriving": (
        "auto x = q.AllocTensor<float>(); DataCopy(x, in, 64); Adds(b.Get<float>(), x, 1.0f, 8);",
        "V reads buffer byte",
    ),
    "a copy takes what is still computed": (
        "auto z = r.AllocTensor<float>(); Duplicate(z, 2.0f, 64); DataCopy(out, z, 64);",
        "MTE3 reads buffer byte",
    ),
    "the vector overwrites what is still leaving": (
        SEND + "DataCopy(out, z, 64); PipeBarrier<PIPE_V>(); Duplicate(z, 3.0f, 64);",
        "V overwrites buffer byte",
    ),
    "a copy overwrites what is still read": (
        LOAD + "Adds(b.Get<float>(), x, 1.0f, 8); PipeBarrier<PIPE_MTE2>(); DataCopy(x, in, 64);",
        "MTE2 overwrites buffer byte",
    ),
    "V after V": (
        "auto y = b.Get<float>(); Duplicate(y, 1.0f, 64); Adds(y[64], y, 1.0f, 64);",
        "read after write of buffer byte 1024 by V without PipeBarrier<PIPE_V>",
    ),
    "a gather of what V just wrote": (
        BUF + "auto o = d.Get<uint32_t>(); Duplicate(o, 0u, 8); PipeBarrier<PIPE_V>(); Duplicate(y, 2.0f, 8); "
        "Gather(y[64], y, o, 0, 8);",
        "read after write of buffer byte 1024 by V without PipeBarrier<PIPE_V>",
    ),
    "a selection by what V just compared": (
        BUF + "auto m = d.Get<uint8_t>(); CompareScalar(m, y, 0.0f, CMPMODE::GT, 64); Select(y[512], m, y, y, "
        "SELMODE::VSEL_TENSOR_TENSOR_MODE, 64);",
        "read after write of buffer byte 5120 by V without PipeBarrier<PIPE_V>",
    ),
    "V over V": (
        "auto y = b.Get<float>(); Duplicate(y, 1.0f, 64); Duplicate(y, 2.0f, 64);",
        "write after write of buffer byte 1024 by V without PipeBarrier<PIPE_V>",
    ),
    "V over what V reads": (
        BUF + "Adds(y[64], y, 1.0f, 64); Duplicate(y, 2.0f, 64);",
        "write after read of buffer byte 1024 by V without PipeBarrier<PIPE_V>",
    ),
    "copies to one place": (
        SEND + "DataCopy(out, z, 64); DataCopy(out, z, 64);",
        "by MTE3 without PipeBarrier<PIPE_MTE3>",
    ),
    "a scalar reads what is still computed": (
        "auto y = b.Get<float>(); Duplicate(y, 1.0f, 64); y.GetValue(0);",
        "S reads buffer byte",
    ),
    "the vector reads what a scalar stores": (
        "auto y = b.Get<float>(); for (int i = 0; i < 8; ++i) y.SetValue(i, 1.0f); Adds(y[64], y, 1.0f, 8);",
        "V reads buffer byte",
    ),
    "a copy takes what a scalar stores": (
        "auto z = r.AllocTensor<float>(); Duplicate(z, 0.0f, 8); auto e = pipe.AllocEventID<HardEvent::V_S>(); "
        "SetFlag<HardEvent::V_S>(e); WaitFlag<HardEvent::V_S>(e); z.SetValue(0, 1.0f); r.EnQue(z); z = "
        "r.DeQue<float>(); DataCopy(out, z, 8);",
        "MTE3 reads buffer byte",
    ),
    "global memory read back while it is written": (
        SEND + "DataCopy(out, z, 64); auto x = q.AllocTensor<float>(); DataCopy(x, out, 64);",
        "MTE2 reads global byte",
    ),
    "a scalar reads past its cache": (
        SEND + "DataCopy(out, z, 64); PipeBarrier<PIPE_ALL>(); out.GetValue(0);",
        "past its data cache",
    ),
    # flags
    "a flag that was never set": ("WaitFlag<HardEvent::V_S>(0);", "was never set, so the core hangs"),
    "a flag set twice": ("SetFlag<HardEvent::V_S>(0); SetFlag<HardEvent::V_S>(0);", "is set already"),
    "a flag nobody waits for": ("SetFlag<HardEvent::V_S>(0);", "still set"),
    "an event id": ("SetFlag<HardEvent::V_S>(8);", "not in 0..7"),
    "more events than there are": ("for (int i = 0; i < 9; ++i) pipe.AllocEventID<HardEvent::V_S>();", "all 8 events"),
}

BETWEEN_BLOCKS = {
    "two blocks write": (SEND + "DataCopy(out, z, 8); r.FreeTensor(z);", "race between blocks"),
    "one writes what another reads": (
        "if (GetBlockIdx() == 0) { auto x = q.AllocTensor<float>(); DataCopy(x, out, 8); q.EnQue(x); x = "
        "q.DeQue<float>(); q.FreeTensor(x); } else {" + SEND + "DataCopy(out, z, 8); r.FreeTensor(z); }",
        "race between blocks",
    ),
}

OBEYED = {
    "all of the buffer": "TBuf<TPosition::VECCALC> big; pipe.InitBuffer(big, 196608 - 6144);",
    "a round trip": LOAD
    + "auto z = r.AllocTensor<float>(); Adds(z, x, 1.0f, 64);"
    + FREE_X
    + "r.EnQue(z); z = r.DeQue<float>(); DataCopy(out, z, 64);"
    + FREE_Z,
    "barriers": BUF
    + "Adds(y[512], y, 1.0f, 256); PipeBarrier<PIPE_V>(); Add(y[512], y[512], y, 256); PipeBarrier<PIPE_V>(); "
    "Duplicate(y, 0.0f, 256);",
    "V beside V": BUF + "Adds(y[512], y, 1.0f, 64); Adds(y[576], y, 1.0f, 64);",
    "a scalar after its flag": BUF
    + "auto e = pipe.AllocEventID<HardEvent::V_S>(); SetFlag<HardEvent::V_S>(e); WaitFlag<HardEvent::V_S>(e); "
    "y.GetValue(3);",
    "a scalar's store after its flag": BUF
    + "auto e = pipe.AllocEventID<HardEvent::V_S>(); SetFlag<HardEvent::V_S>(e); WaitFlag<HardEvent::V_S>(e); "
    "y.SetValue(3, 2.0f); auto f = pipe.AllocEventID<HardEvent::S_V>(); SetFlag<HardEvent::S_V>(f); "
    "WaitFlag<HardEvent::S_V>(f); Adds(y, y, 1.0f, 8);",
    "copies to one place with a barrier": SEND
    + "DataCopy(out, z, 64); PipeBarrier<PIPE_MTE3>(); DataCopy(out, z, 64);"
    + FREE_Z,
    "255 repeats": BUF
    + "WholeReduceSum(y, y, 64, 1, 1, 1, 8); PipeBarrier<PIPE_V>(); Mul(y[512], y, y, 64, 255, {1, 1, 1, 0, 0, 0});",
    "eight tensors": "TQue<TPosition::VECIN, 8> many; pipe.InitBuffer(many, 8, 32); for (int i = 0; i < 8; ++i) { "
    "auto x = many.AllocTensor<float>(); DataCopy(x, in, 8); many.EnQue(x); } for (int i = 0; i < 8; "
    "++i) { auto x = many.DeQue<float>(); many.FreeTensor(x); }",
}

EVERY = {**BROKEN, **BETWEEN_BLOCKS, **{name: (body, "") for name, body in OBEYED.items()}}
PROLOGUE = """TPipe pipe; GlobalTensor<float> in, out;
in.SetGlobalBuffer((float*)in_address, 1024); out.SetGlobalBuffer((float*)out_address, 1024);
TQue<TPosition::VECIN, 1> q; TQue<TPosition::VECOUT, 1> r; TBuf<TPosition::VECCALC> b; TBuf<TPosition::VECIN> d;
pipe.InitBuffer(q, 2, 256); pipe.InitBuffer(r, 2, 256); pipe.InitBuffer(b, 4096); pipe.InitBuffer(d, 1024);
"""


@pytest.fixture(scope="module")
def library(build_folder: Path, stand_in_core: list[Path]) -> ctypes.CDLL:
    text = ['#include "kernel_operator.h"', '#include "run.h"', "using namespace AscendC;"]
    for i, (body, _) in enumerate(EVERY.values()):
        text.append(f"""extern "C" const char* rule_{i}(uint32_t blocks, uint8_t* in_address, uint8_t* out_address) {{
  return ascend_sim::caught([=] {{
    ascend_sim::run(blocks, {{{{in_address, 4096, false}}, {{out_address, 4096, true}}}}, [=] {{ {PROLOGUE}{body} }});
  }});
}}""")
    source = build_folder / "rules.cpp"
    source.write_text("\n".join(text))
    return ctypes.CDLL(str(compile_(build_folder / "rules.so", "-w", "-O0", "-shared", source, *stand_in_core)))


def says(library: ctypes.CDLL, name: str, blocks: int) -> str:
    function = getattr(library, f"rule_{list(EVERY).index(name)}")
    function.argtypes, function.restype = [ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p], ctypes.c_char_p
    memory = torch.zeros(2, 1024 + 16)  # rows at addresses aligned to 32 bytes
    assert memory.data_ptr() % 32 == 0
    text = function(blocks, memory[0].data_ptr(), memory[1].data_ptr())
    assert isinstance(text, bytes)
    return text.decode()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_an_error(library: ctypes.CDLL, name: str) -> None:
    assert BROKEN[name][1] in says(library, name, 1)


@pytest.mark.parametrize("name", BETWEEN_BLOCKS)
def test_races_between_blocks_are_errors(library: ctypes.CDLL, name: str) -> None:
    assert says(library, name, 1) == ""
    assert BETWEEN_BLOCKS[name][1] in says(library, name, 2)


@pytest.mark.parametrize("name", OBEYED)
def test_what_is_allowed_passes(library: ctypes.CDLL, name: str) -> None:
    assert says(library, name, 1) == ""
