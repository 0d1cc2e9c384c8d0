# ruff: noqa: E501
"""What is broken in each kernel, and what must stop it: a rule of the stand-in, or a result that is wrong."""

from __future__ import annotations

from stand_in import Mutation

# fmt: off
FWD, STATE, TABLES, ROWS = "restricted_fwd.h", "softmax_state.h", "tables.h", "rows.h"
NO_BARRIER = "without PipeBarrier<PIPE_V>"
RESTRICTED_FWD = [
    Mutation("no barrier after the rows are widened", FWD, "tile.count * width_);\n      PipeBarrier<PIPE_V>();", "tile.count * width_);", NO_BARRIER),
    Mutation("no barrier between folds", FWD, "      }\n      PipeBarrier<PIPE_V>();\n    }\n    const int32_t parts", "      }\n    }\n    const int32_t parts", NO_BARRIER),
    Mutation("no barrier before the exponential", STATE, "{1, 1, 0, 8, 8, 0});\n    PipeBarrier<PIPE_V>();", "{1, 1, 0, 8, 8, 0});", NO_BARRIER),
    Mutation("rows are freed before they are read", FWD, "      Widen(wide, raw,", "      rows_in_.FreeTensor(raw);\n      Widen(wide, raw,", "a stale tensor"),
    Mutation("rows skip the queue", FWD, "    rows_in_.EnQue(raw);", "", "DeQue: the queue is empty"),
    Mutation("hidden is never freed", FWD, "    hidden_in_.FreeTensor(raw);", "", "all 1 buffers of the queue are in use"),
    Mutation("four buffers for rows", FWD, "InitBuffer(rows_in_, 2,", "InitBuffer(rows_in_, 4,", "the unified buffer overflows"),
    Mutation("a row that is no multiple of 32 bytes", FWD, "weight_[static_cast<uint64_t>(column_table_.At(tile.first + i)) * width_], width_);", "weight_[static_cast<uint64_t>(column_table_.At(tile.first + i)) * width_], width_ - 8);", "no multiple of 32"),
    Mutation("a row at an address that is not aligned", FWD, "(column_table_.At(tile.first + i)) * width_]", "(column_table_.At(tile.first + i)) * width_ + 8]", "not aligned to 32 bytes"),
    Mutation("the row after the one that is wanted", FWD, "(column_table_.At(tile.first + i))", "(column_table_.At(tile.first + i) + 1)", "of a global tensor that has 0 left"),
    Mutation("padding lanes are not cleared", FWD, "    Duplicate(products_.Get<float>(), 0.0f, static_cast<int32_t>(rows * fold_));\n", "", "that nothing has written"),
    Mutation("the last fold reaches into the next row", FWD, "Least(fold_, width_ - start)", "fold_", "elements of a tensor"),
    Mutation("the folds are summed out of order", FWD, "hidden[start], lanes);", "hidden, lanes);", "wrong"),
    Mutation("blocks overlap by a list", TABLES, "work * (block + 1) / blocks)}", "work * (block + 1) / blocks + 2)}", "race between blocks"),
    Mutation("z is sent off before it is used", FWD, "    state_.Add(z, tile.count);", "    z_out_.EnQue(z);\n    state_.Add(z, tile.count);", "a stale tensor"),
    Mutation("the last logit of a tile is not written", FWD, "static_cast<uint32_t>(tile.count * sizeof(float)), 0, 0, 0});", "static_cast<uint32_t>((tile.count - (tile.count > 1)) * sizeof(float)), 0, 0, 0});", "wrong"),
    Mutation("logits beyond the tile are reduced", STATE, "WholeReduceMax(top, z, lanes,", "WholeReduceMax(top, z, lanes + 1,", "that nothing has written"),
    Mutation("the maximum is not subtracted", STATE, "Sub(shares, z, peak, count, 1, {1, 1, 0, 8, 8, 0});", "Adds(shares, z, 0.0f, lanes);", "wrong"),
    Mutation("earlier sums are not faded", STATE, "    Mul(state_[kBlock], state_[kBlock], fade, block);\n", "", "wrong"),
    Mutation("the mixture is not faded", FWD, "if (!tile.opens) ScaleRow(mixture_row_, mixture_row_, state_.Fade(), width_);", "", "wrong"),
    Mutation("the gold logit is the tile's first", FWD, "static_cast<uint32_t>(gold_ - tile.first)", "0", "wrong"),
    Mutation("a gold behind the tile counts", FWD, "gold_ < static_cast<int64_t>(tile.first + tile.count)", "gold_ <= static_cast<int64_t>(tile.first + tile.count)", "that nothing has written"),
    Mutation("the table is read before it has arrived", TABLES, "    SetFlag<HardEvent::MTE2_S>(filled_);\n    WaitFlag<HardEvent::MTE2_S>(filled_);\n", "", "S reads buffer byte"),
    Mutation("the table is overwritten while it is read", TABLES, "    SetFlag<HardEvent::S_MTE2>(emptied_);\n    WaitFlag<HardEvent::S_MTE2>(emptied_);\n", "", "MTE2 overwrites buffer byte"),
    Mutation("a flag nobody waits for", TABLES, "    WaitFlag<HardEvent::S_MTE2>(emptied_);\n", "", "still set"),
    Mutation("arithmetic on bfloat16", FWD, "      Widen(wide, raw,", "      Muls(raw, raw, T{}, 16);\n      Widen(wide, raw,", "bfloat16 has no arithmetic"),
    Mutation("the row's tail is not scaled", ROWS, "  if (rest) MulAddDst(", "  if (false) MulAddDst(", "wrong"),
]
