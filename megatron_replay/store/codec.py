"""Columns of integers to bytes and back, without a Python loop over values.

A column is n unsigned integers of `width` bytes; float columns come as their bit patterns. The reader always knows n
from the block's counts, so a stored length never decides how much is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import zstandard

from megatron_replay.errors import StoreError
from megatron_replay.store.files import Buffer
from megatron_replay.store.format import Codec, Logits
from megatron_replay.store.sample_sets import Array

LEVEL = 3
"""zstd level; 6 and 9 are smaller by less than 1 % on byte planes and three to six times slower."""


def num_frames(width: int, codec: Codec) -> int:
    return 1 if codec == "raw" else width


def encode(values: Array, width: int, codec: Codec) -> list[bytes]:
    """Frames of a column: values [n] -> one frame (raw) or `width` frames (zd)."""
    planes = values.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width]
    if codec == "raw":
        return [planes.tobytes()]
    squeeze = zstandard.ZstdCompressor(level=LEVEL)
    frames = []
    for i in range(width):
        plain = planes[:, i].tobytes()
        packed = squeeze.compress(plain)
        frames.append(packed if len(packed) < len(plain) else plain)
    return frames


def decode(frames: Sequence[Buffer], count: int, width: int, codec: Codec) -> Array:
    """The column [count] uint32 of its frames. Raises ValueError where a frame is not what a writer makes."""
    planes = np.zeros((count, 4), np.uint8)
    if codec == "raw":
        if len(frames[0]) != count * width:
            raise ValueError(f"{len(frames[0])} bytes where {count * width} belong")
        planes[:, :width] = np.frombuffer(frames[0], np.uint8).reshape(count, width)
    else:
        for i, frame in enumerate(frames):
            planes[:, i] = np.frombuffer(_plain(frame, count), np.uint8)
    return planes.view("<u4").reshape(count)


def _plain(frame: Buffer, count: int) -> Buffer:
    if len(frame) == count:
        return frame
    if len(frame) > count or zstandard.frame_content_size(frame) != count:
        raise ValueError(f"a frame of {len(frame)} bytes does not say it holds {count} bytes")
    try:
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=count)
    except zstandard.ZstdError as err:
        raise ValueError(f"a frame cannot be decompressed ({err})") from err


def to_steps(values: Array, starts: Array) -> Array:
    """Ascending runs [n] -> the first value of each run unchanged, then differences less 1.

    starts: index of each (non-empty) run's first value.
    """
    steps = np.diff(values.astype(np.int64), prepend=0) - 1
    steps[starts] = values[starts]
    return steps


def from_steps(steps: Array, starts: Array, sizes: Array) -> Array:
    """The inverse of `to_steps`, as int64 [n]; runs are `sizes` long."""
    total = steps.astype(np.int64)
    first = total[starts]
    total += 1
    total.cumsum(out=total)
    total -= np.repeat(total[starts] - first, sizes)
    return total


def pack_logits(values: Array, kind: Logits) -> Array:
    """float32 [n] -> bit patterns [n] uint32, rounded to nearest even.

    Raises StoreError for a value the type cannot hold.
    """
    exact = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(exact).all():
        raise StoreError("a logit is not finite; the base model's forward pass failed on this sample")
    if kind == "fp16":
        if len(exact) and np.abs(exact).max() >= 65_520:
            raise StoreError(f"a logit of {np.abs(exact).max():g} does not fit fp16 (65504); store logits as bf16")
        return exact.astype("<f2").view("<u2").astype(np.uint32)
    bits = exact.view(np.uint32)
    rounded = bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)
    return (rounded >> 16).astype(np.uint32)


def unpack_logits(bits: Array, kind: Logits) -> Array:
    """Bit patterns [n] uint32 -> float32 [n]."""
    if kind == "fp16":
        return bits.astype("<u2").view("<f2").astype(np.float32)
    return (bits << 16).astype("<u4").view("<f4").astype(np.float32)
