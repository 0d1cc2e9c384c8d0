"""Broken variants of each kernel, and what must stop each: a rule of the stand-in, or a result that is wrong."""

from __future__ import annotations

from stand_in import Mutation

FWD, STATE, TABLES, TILES, ROWS = "restricted_fwd.h", "softmax_state.h", "tables.h", "tiles.h", "rows.h"
NO_BARRIER = "without PipeBarrier<PIPE_V>"
RESTRICTED_FWD = [
    Mutation(
        "no barrier after the rows are widened",
        FWD,
        "tile.count * width_);\n      PipeBarrier<PIPE_V>();",
        "tile.count * width_);",
        NO_BARRIER,
    ),
    Mutation(
        "no barrier between folds",
        FWD,
        "      }\n      PipeBarrier<PIPE_V>();\n    }\n    const int32_t parts",
        "      }\n    }\n    const int32_t parts",
        NO_BARRIER,
    ),
    Mutation(
        "no barrier before the exponential",
        STATE,
        "{1, 1, 0, 8, 8, 0});\n    PipeBarrier<PIPE_V>();",
        "{1, 1, 0, 8, 8, 0});",
        NO_BARRIER,
    ),
    Mutation(
        "rows are freed before they are read",
        FWD,
        "      Widen(wide, raw,",
        "      rows_in_.FreeTensor(raw);\n      Widen(wide, raw,",
        "a stale tensor",
    ),
    Mutation("rows skip the queue", FWD, "    rows_in_.EnQue(raw);", "", "DeQue: the queue is empty"),
    Mutation(
        "hidden is never freed", FWD, "    hidden_in_.FreeTensor(raw);", "", "all 1 buffers of the queue are in use"
    ),
    Mutation(
        "four buffers for rows",
        FWD,
        "InitBuffer(rows_in_, 2,",
        "InitBuffer(rows_in_, 4,",
        "the unified buffer overflows",
    ),
    Mutation(
        "a row that is no multiple of 32 bytes",
        FWD,
        "weight_[static_cast<uint64_t>(column_table_.At(tile.first + i)) * width_], width_);",
        "weight_[static_cast<uint64_t>(column_table_.At(tile.first + i)) * width_], width_ - 8);",
        "no multiple of 32",
    ),
    Mutation(
        "a row at an address that is not aligned",
        FWD,
        "(column_table_.At(tile.first + i)) * width_]",
        "(column_table_.At(tile.first + i)) * width_ + 8]",
        "not aligned to 32 bytes",
    ),
    Mutation(
        "the row after the one that is wanted",
        FWD,
        "(column_table_.At(tile.first + i))",
        "(column_table_.At(tile.first + i) + 1)",
        "of a global tensor that has 0 left",
    ),
    Mutation(
        "padding lanes are not cleared",
        FWD,
        "    Duplicate(products_.Get<float>(), 0.0f, static_cast<int32_t>(rows * fold_));\n",
        "",
        "that nothing has written",
    ),
    Mutation(
        "the last fold reaches into the next row", FWD, "Least(fold_, width_ - start)", "fold_", "elements of a tensor"
    ),
    Mutation("the folds are summed out of order", FWD, "hidden[start], lanes);", "hidden, lanes);", "wrong"),
    Mutation(
        "blocks overlap by a list",
        TABLES,
        "work * (block + 1) / blocks)}",
        "work * (block + 1) / blocks + 2)}",
        "race between blocks",
    ),
    Mutation(
        "z is sent off before it is used",
        FWD,
        "    state_.Add(z, tile.count);",
        "    z_out_.EnQue(z);\n    state_.Add(z, tile.count);",
        "a stale tensor",
    ),
    Mutation(
        "the last logit of a tile is not written",
        FWD,
        "static_cast<uint32_t>(tile.count * sizeof(float)), 0, 0, 0});",
        "static_cast<uint32_t>((tile.count - (tile.count > 1)) * sizeof(float)), 0, 0, 0});",
        "wrong",
    ),
    Mutation(
        "logits beyond the tile are reduced",
        STATE,
        "WholeReduceMax(top, z, lanes,",
        "WholeReduceMax(top, z, lanes + 1,",
        "that nothing has written",
    ),
    Mutation(
        "the maximum is not subtracted",
        STATE,
        "Sub(shares, z, peak, count, 1, {1, 1, 0, 8, 8, 0});",
        "Adds(shares, z, 0.0f, lanes);",
        "wrong",
    ),
    Mutation(
        "earlier sums are not faded", STATE, "    Mul(state_[kBlock], state_[kBlock], fade, block);\n", "", "wrong"
    ),
    Mutation(
        "the mixture is not faded",
        FWD,
        "if (!tile.opens) ScaleRow(mixture_row_, mixture_row_, state_.Fade(), width_);",
        "",
        "wrong",
    ),
    Mutation("the gold logit is the tile's first", FWD, "static_cast<uint32_t>(gold_ - tile.first)", "0", "wrong"),
    Mutation(
        "a gold behind the tile counts",
        FWD,
        "gold_ < static_cast<int64_t>(tile.first + tile.count)",
        "gold_ <= static_cast<int64_t>(tile.first + tile.count)",
        "that nothing has written",
    ),
    Mutation(
        "the table is read before it has arrived",
        TABLES,
        "    SetFlag<HardEvent::MTE2_S>(filled_);\n    WaitFlag<HardEvent::MTE2_S>(filled_);\n",
        "",
        "S reads buffer byte",
    ),
    Mutation(
        "the table is overwritten while it is read",
        TABLES,
        "    SetFlag<HardEvent::S_MTE2>(emptied_);\n    WaitFlag<HardEvent::S_MTE2>(emptied_);\n",
        "",
        "MTE2 overwrites buffer byte",
    ),
    Mutation("a flag nobody waits for", TABLES, "    WaitFlag<HardEvent::S_MTE2>(emptied_);\n", "", "still set"),
    Mutation(
        "arithmetic on bfloat16",
        FWD,
        "      Widen(wide, raw,",
        "      Muls(raw, raw, T{}, 16);\n      Widen(wide, raw,",
        "bfloat16 has no arithmetic",
    ),
    Mutation("the row's tail is not scaled", ROWS, "  if (rest) MulAddDst(", "  if (false) MulAddDst(", "wrong"),
]
DH = "restricted_bwd_dh.h"
RESTRICTED_BWD_DH = [
    Mutation(
        "no barrier after the row is widened",
        DH,
        "Widen(wide, row, step.count);\n      PipeBarrier<PIPE_V>();",
        "Widen(wide, row, step.count);",
        NO_BARRIER,
    ),
    Mutation(
        "the row is freed before it is read",
        DH,
        "      Widen(wide, row, step.count);",
        "      row_in_.FreeTensor(row);\n      Widen(wide, row, step.count);",
        "a stale tensor",
    ),
    Mutation("the row skips the queue", DH, "    row_in_.EnQue(row);", "", "DeQue: the queue is empty"),
    Mutation(
        "the mixture is never freed",
        DH,
        "    mixture_in_.FreeTensor(mixture);",
        "",
        "with a tensor of a queue not freed",
    ),
    Mutation(
        "eight buffers for what leaves",
        DH,
        "InitBuffer(mixture_out_, 2,",
        "InitBuffer(mixture_out_, 8,",
        "the unified buffer overflows",
    ),
    Mutation(
        "a row that is no multiple of 32 bytes",
        DH,
        "weight_[column * width_ + step.start], step.count);",
        "weight_[column * width_ + step.start], step.count - 8);",
        "no multiple of 32",
    ),
    Mutation(
        "a row at an address that is not aligned",
        DH,
        "weight_[column * width_ + step.start]",
        "weight_[column * width_ + step.start + 8]",
        "not aligned to 32 bytes",
    ),
    Mutation(
        "a row far outside", DH, "weight_[column * width_", "weight_[(column + (1u << 20)) * width_", "GlobalTensor["
    ),
    Mutation("a gold elsewhere counts as here", DH, "    if (step.gold < 0) return;\n", "", "GlobalTensor.GetValue("),
    Mutation("the gold row is added", DH, "-step.drop", "step.drop", "wrong"),
    Mutation(
        "the last slice is as long as the others",
        DH,
        "      step.count = Least(slice_, width_ - step.start);\n",
        "",
        "of a global tensor that has",
    ),
    Mutation(
        "blocks overlap by a position",
        TABLES,
        "static_cast<uint32_t>(count * (block + 1) / blocks)}",
        "static_cast<uint32_t>(count * (block + 1) / blocks + 1)}",
        "race between blocks",
    ),
    Mutation(
        "the factors are exchanged",
        DH,
        "keep_table_.At(token), drop_table_.At(token)",
        "drop_table_.At(token), keep_table_.At(token)",
        "wrong",
    ),
    Mutation(
        "the column before the gold",
        DH,
        "columns_.GetValue(static_cast<uint64_t>(step.gold))",
        "columns_.GetValue(static_cast<uint64_t>(step.gold ? step.gold - 1 : 1))",
        "wrong",
    ),
    Mutation(
        "the result is sent without the queue",
        DH,
        "    mixture_out_.EnQue(out);\n    out = mixture_out_.template DeQue<float>();\n",
        "",
        "MTE3 reads buffer byte",
    ),
]

DW = "restricted_bwd_dw.h"
RESTRICTED_BWD_DW = [
    Mutation(
        "no barrier between entries",
        DW,
        "factor, static_cast<int32_t>(width_));\n      }\n      PipeBarrier<PIPE_V>();",
        "factor, static_cast<int32_t>(width_));\n      }",
        NO_BARRIER,
    ),
    Mutation(
        "hidden states are freed before they are read",
        DW,
        "      Widen(wide, raw, tile.count * width_);",
        "      hidden_in_.FreeTensor(raw);\n      Widen(wide, raw, tile.count * width_);",
        "a stale tensor",
    ),
    Mutation("hidden states skip the queue", DW, "    hidden_in_.EnQue(raw);", "", "DeQue: the queue is empty"),
    Mutation(
        "hidden states are never freed",
        DW,
        "      PipeBarrier<PIPE_V>();\n      hidden_in_.FreeTensor(raw);",
        "      PipeBarrier<PIPE_V>();",
        "all 2 buffers of the queue are in use",
    ),
    Mutation(
        "twelve buffers for hidden states",
        DW,
        "InitBuffer(hidden_in_, 2,",
        "InitBuffer(hidden_in_, 12,",
        "the unified buffer overflows",
    ),
    Mutation(
        "a row that is no multiple of 32 bytes",
        DW,
        "* width_], width_);\n    }\n    hidden_in_",
        "* width_], width_ - 8);\n    }\n    hidden_in_",
        "no multiple of 32",
    ),
    Mutation(
        "a position far outside",
        DW,
        "token_table_.At(tile.first + i))",
        "token_table_.At(tile.first + i) + 4096)",
        "GlobalTensor[",
    ),
    Mutation(
        "blocks overlap by a part",
        DW,
        "PartFrom(work * (block + 1) / blocks)",
        "PartFrom(work * (block + 1) / blocks + 2)",
        "race between blocks",
    ),
    Mutation(
        "first parts lie where others' last ones do",
        DW,
        "return part ? slot : slot + (entries + kPart - 1) / kPart;",
        "return slot;",
        "race between blocks",
    ),
    Mutation(
        "the last part is not merged",
        DW,
        "Merge(row, start, (count + kPart - 1) / kPart)",
        "Merge(row, start, count / kPart)",
        "wrong",
    ),
    Mutation(
        "a row of just one part waits for the merge",
        DW,
        "tile.whole = stop_ - start_ <= kPart;",
        "tile.whole = stop_ - start_ < kPart;",
        "wrong",
    ),
    Mutation("every tile begins a new sum", DW, "if (i == 0 && tile.opens)", "if (i == 0)", "wrong"),
    Mutation(
        "the gradient is not read",
        DW,
        "    if (tile.closes && tile.whole) gradient_.Load(tile.target);\n",
        "",
        "DeQue: the queue is empty",
    ),
    Mutation("rows are counted, not looked up", DW, ": add_      ?", ": !add_      ?", "wrong"),
    Mutation(
        "the factor of the entry before",
        DW,
        "factor_table_.At(tile.first + i)",
        "factor_table_.At(tile.first + i - (i > 0))",
        "wrong",
    ),
    Mutation(
        "the sum is sent without the queue",
        DW,
        "      sums.EnQue(sum);\n      sum = sums.template DeQue<float>();\n      DataCopy(target",
        "      DataCopy(target",
        "MTE3 reads buffer byte",
    ),
]

LF = "logits_fwd.h"
LOGITS_FWD = [
    Mutation(
        "no barrier after the elements are widened",
        LF,
        "Widen(wide, picked, tile.count * kSlot);\n    PipeBarrier<PIPE_V>();",
        "Widen(wide, picked, tile.count * kSlot);",
        NO_BARRIER,
    ),
    Mutation(
        "no barrier after the gather", LF, "0, tile.count);\n    PipeBarrier<PIPE_V>();", "0, tile.count);", NO_BARRIER
    ),
    Mutation(
        "elements are freed before they are read",
        LF,
        "    Widen(wide, picked,",
        "    picked_in_.FreeTensor(picked);\n    Widen(wide, picked,",
        "a stale tensor",
    ),
    Mutation("elements skip the queue", LF, "    picked_in_.EnQue(picked);", "", "DeQue: the queue is empty"),
    Mutation(
        "a hundred buffers", LF, "InitBuffer(picked_in_, 2,", "InitBuffer(picked_in_, 100,", "and a kernel may have 64"
    ),
    Mutation(
        "elements at addresses that are not aligned",
        LF,
        "picked[i * kSlot]",
        "picked[i * (kSlot / 2)]",
        "not aligned to 32 bytes",
    ),
    Mutation(
        "a copy of whole blocks",
        LF,
        "DataCopyPad(picked[i * kSlot], row[static_cast<uint64_t>(column_table_.At(tile.first + i))], one, unpadded);",
        "DataCopy(picked[i * kSlot], row[static_cast<uint64_t>(column_table_.At(tile.first + i))], kSlot);",
        "not aligned to 32 bytes; use DataCopyPad",
    ),
    Mutation(
        "a column far outside",
        LF,
        "column_table_.At(tile.first + i))]",
        "column_table_.At(tile.first + i)) + (1u << 30)]",
        "GlobalTensor[",
    ),
    Mutation(
        "offsets in elements, not bytes",
        LF,
        "static_cast<int32_t>(kSlot * sizeof(float)), static",
        "static_cast<int32_t>(kSlot), static",
        "wrong",
    ),
    Mutation(
        "offsets between elements",
        LF,
        "static_cast<int32_t>(kSlot * sizeof(float)), static",
        "static_cast<int32_t>(kSlot * sizeof(float) - 2), static",
        "is no multiple of 4",
    ),
    Mutation("the gold logit is the tile's first", LF, "static_cast<uint32_t>(gold - tile.first)", "0", "wrong"),
    Mutation("rows a column too close", LF, "(tile.token) * stride_]", "(tile.token) * (stride_ - 1)]", "wrong"),
    Mutation(
        "the last logit of a tile is not written",
        LF,
        "static_cast<uint32_t>(tile.count * sizeof(float))",
        "static_cast<uint32_t>((tile.count - 1) * sizeof(float))",
        "wrong",
    ),
    Mutation(
        "the next block's first position",
        TILES,
        "return token_ < range_.last;",
        "return token_ <= range_.last;",
        "race between blocks",
    ),
    Mutation(
        "every tile opens a position",
        TILES,
        "opens_ = tile.closes;",
        "opens_ = true;",
        "all 2 buffers of the queue are in use",
    ),
]

LB = "logits_bwd.h"
LOGITS_BWD = [
    Mutation(
        "no barrier after the exponential",
        LB,
        "Exp(share, share, count);\n    PipeBarrier<PIPE_V>();",
        "Exp(share, share, count);",
        NO_BARRIER,
    ),
    Mutation(
        "no barrier before the elements are spread",
        LB,
        "repeats * kBlock);\n      PipeBarrier<PIPE_V>();",
        "repeats * kBlock);",
        NO_BARRIER,
    ),
    Mutation(
        "logits are freed before they are read",
        LB,
        "    Adds(share, z, -peak",
        "    z_in_.FreeTensor(z);\n    Adds(share, z, -peak",
        "a stale tensor",
    ),
    Mutation("logits skip the queue", LB, "    z_in_.EnQue(z);", "", "DeQue: the queue is empty"),
    Mutation(
        "elements are sent without the queue",
        LB,
        "    spread_out_.EnQue(spread);\n    spread = spread_out_.template DeQue<T>();\n",
        "",
        "MTE3 reads buffer byte",
    ),
    Mutation("the maximum is not subtracted", LB, "-peak_table_.At(tile.token)", "0.0f", "wrong"),
    Mutation("the gold is the tile's first", LB, "1ull << (gold - static_cast<int64_t>(tile.first))", "1ull", "wrong"),
    Mutation(
        "a column far outside",
        LB,
        "column_table_.At(tile.first + i))]",
        "column_table_.At(tile.first + i)) + (1u << 30)]",
        "GlobalTensor[",
    ),
    Mutation(
        "the next position's row",
        LB,
        "static_cast<uint64_t>(tile.token) * vocab_]",
        "(tile.token + 1ull) * vocab_]",
        "GlobalTensor[",
    ),
    Mutation("rounded without a mode", LB, "RoundMode::CAST_RINT", "RoundMode::CAST_NONE", "needs a rounding mode"),
    Mutation(
        "padding lanes are not cleared",
        LB,
        "    Duplicate(share_.Get<float>(), 0.0f, static_cast<int32_t>(kLanes));\n",
        "",
        "that nothing has written",
    ),
    Mutation("half an element", LB, "one{1, sizeof(T), 0, 0, 0}", "one{1, 1, 0, 0, 0}", "are not whole elements"),
    Mutation("not divided by the sum", LB, "factor_table_.At(tile.token)", "1.0f", "wrong"),
    Mutation(
        "arithmetic on bfloat16",
        LB,
        "    spread_out_.EnQue(spread);",
        "    Muls(spread, spread, T{}, 16);\n    spread_out_.EnQue(spread);",
        "bfloat16 has no arithmetic",
    ),
    Mutation(
        "blocks overlap by a list",
        TABLES,
        "work * (block + 1) / blocks)}",
        "work * (block + 1) / blocks + 80)}",
        "race between blocks",
    ),
]

MS, CHUNKS = "moclip_stats.h", "chunks.h"
MOCLIP_STATS = [
    Mutation(
        "no barrier after the gradient is widened",
        MS,
        "Widen(grad, raw, tile.count);\n      PipeBarrier<PIPE_V>();",
        "Widen(grad, raw, tile.count);",
        NO_BARRIER,
    ),
    Mutation(
        "no barrier before the reduction",
        MS,
        "    grad_in_.FreeTensor(raw);\n    PipeBarrier<PIPE_V>();",
        "    grad_in_.FreeTensor(raw);",
        NO_BARRIER,
    ),
    Mutation(
        "no barrier after the reduction",
        MS,
        "kStatsTile / kLanes), 1,\n                   1, 8);\n    PipeBarrier<PIPE_V>();",
        "kStatsTile / kLanes), 1,\n                   1, 8);",
        NO_BARRIER,
    ),
    Mutation(
        "the gradient is freed before it is read",
        MS,
        "      Widen(grad, raw, tile.count);",
        "      grad_in_.FreeTensor(raw);\n      Widen(grad, raw, tile.count);",
        "a stale tensor",
    ),
    Mutation("the momentum skips the queue", MS, "    momentum_in_.EnQue(momentum);", "", "DeQue: the queue is empty"),
    Mutation(
        "the momentum is never freed",
        MS,
        "      momentum_in_.FreeTensor(momentum);\n",
        "",
        "with a tensor of a queue not freed",
    ),
    Mutation(
        "sixteen buffers for the gradient",
        MS,
        "InitBuffer(grad_in_, 2,",
        "InitBuffer(grad_in_, 16,",
        "the unified buffer overflows",
    ),
    Mutation(
        "padding lanes are not cleared",
        MS,
        "tile.count < kStatsTile || !has_momentum_",
        "!has_momentum_",
        "that nothing has written",
    ),
    Mutation("too many repeats", MS, "kSums * kStatsTile / kLanes)", "kSums * kStatsTile / kBlock)", "1536 repeats"),
    Mutation(
        "sums are never cleared",
        MS,
        "    if (tile.opens) Duplicate(sums, 0.0f, static_cast<int32_t>(kSums * kLanes));\n",
        "",
        "that nothing has written",
    ),
    Mutation("sums are cleared for every tile", MS, "if (tile.opens) Duplicate(sums", "Duplicate(sums", "wrong"),
    Mutation(
        "sums at an address that is not aligned",
        MS,
        "static_cast<uint64_t>(tile.chunk) * kPartials]",
        "static_cast<uint64_t>(tile.chunk) * kPartials + 4]",
        "not aligned to 32 bytes",
    ),
    Mutation(
        "all chunks leave their sums in one place",
        MS,
        "static_cast<uint64_t>(tile.chunk) * kPartials]",
        "0]",
        "race between blocks",
    ),
    Mutation(
        "the momentum's square for the product",
        MS,
        "Mul(products, momentum, grad, count);",
        "Mul(products, momentum, momentum, count);",
        "wrong",
    ),
    Mutation(
        "the last chunk is as long as the others",
        CHUNKS,
        "Least<uint64_t>(static_cast<uint64_t>(chunk + 1) * kChunk, length_);",
        "static_cast<uint64_t>(chunk + 1) * kChunk;",
        "of a global tensor that has",
    ),
    Mutation(
        "a copy of whole blocks",
        CHUNKS,
        "  DataCopyPad(target, source, DataCopyExtParams{1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0},\n     "
        "         DataCopyPadExtParams<T>{false, 0, 0, T{}});",
        "  DataCopy(target, source, count);",
        "use DataCopyPad",
    ),
]

MU = "moclip_update.h"
MOCLIP_UPDATE = [
    Mutation(
        "no barrier after the moments' products",
        MU,
        "Axpy(m_new, grad, s_.m_grad, n);\n    PipeBarrier<PIPE_V>();",
        "Axpy(m_new, grad, s_.m_grad, n);",
        NO_BARRIER,
    ),
    Mutation(
        "no barrier after the division",
        MU,
        "Div(t, t, z, n);\n    PipeBarrier<PIPE_V>();",
        "Div(t, t, z, n);",
        NO_BARRIER,
    ),
    Mutation(
        "the gradient is freed before it is read",
        MU,
        "    Widen(grad, raw, tile.count);",
        "    grad_in_.FreeTensor(raw);\n    Widen(grad, raw, tile.count);",
        "a stale tensor",
    ),
    Mutation(
        "results are sent without the queue",
        MU,
        "    queue.EnQue(local);\n    local = queue.template DeQue<T>();\n",
        "",
        "MTE3 reads buffer byte",
    ),
    Mutation(
        "the second moment is never freed", MU, "    v_in_.FreeTensor(v);\n", "", "with a tensor of a queue not freed"
    ),
    Mutation("twelve vectors of scratch", MU, "kVectors = 6", "kVectors = 12", "the unified buffer overflows"),
    Mutation(
        "the second moment takes the new first one",
        MU,
        "Axpy(w, m, s_.v_momentum, n);",
        "Axpy(w, m_new, s_.v_momentum, n);",
        "wrong",
    ),
    Mutation("octants are exchanged", MU, "Select(u, steep, t, u,", "Select(u, steep, u, t,", "wrong"),
    Mutation("the sign is dropped", MU, "    Or(bits, bits, signs, 2 * n);\n", "", "wrong"),
    Mutation(
        "nothing is done about 0 / 0",
        MU,
        "    Maxs(z, z, kTiny, n);  // 0 / 0 is to be 0\n    PipeBarrier<PIPE_V>();\n",
        "",
        "wrong",
    ),
    Mutation(
        "lanes left from the tile before count", MU, "    if (tile.count < kUpdateTile) {", "    if (false) {", "wrong"
    ),
    Mutation("the step goes uphill", MU, "Axpy(wide, u, -s_.rate, n);", "Axpy(wide, u, s_.rate, n);", "wrong"),
    Mutation("no decay", MU, "    Muls(wide, wide, s_.keep, n);\n    PipeBarrier<PIPE_V>();\n", "", "wrong"),
    Mutation(
        "rounded without a mode",
        MU,
        "Cast(rounded, wide, RoundMode::CAST_RINT",
        "Cast(rounded, wide, RoundMode::CAST_NONE",
        "needs a rounding mode",
    ),
    Mutation(
        "a comparison of any length",
        MU,
        "CMPMODE::GT, kUpdateTile);",
        "CMPMODE::GT, static_cast<uint32_t>(n));",
        "no multiple of 256 bytes",
    ),
    Mutation(
        "sums are never cleared",
        MU,
        "    if (tile.opens) Duplicate(sum, 0.0f, repeats);\n",
        "",
        "that nothing has written",
    ),
    Mutation(
        "all chunks leave their sums in one place",
        MU,
        "static_cast<uint64_t>(tile.chunk) * kPartials]",
        "0]",
        "race between blocks",
    ),
    Mutation("a coefficient of the arctangent", MU, "0.199937731f", "0.199f", "wrong"),
]

TK = "topk.h"
TOPK = [
    Mutation(
        "no barrier after the chunk is widened",
        TK,
        "Widen(wide, raw, chunk.count);\n    PipeBarrier<PIPE_V>();",
        "Widen(wide, raw, chunk.count);",
        NO_BARRIER,
    ),
    Mutation(
        "no barrier after the comparison",
        TK,
        "CMPMODE::GT, count);\n    PipeBarrier<PIPE_V>();",
        "CMPMODE::GT, count);",
        NO_BARRIER,
    ),
    Mutation(
        "the chunk is freed before it is read",
        TK,
        "    Widen(wide, raw, chunk.count);",
        "    chunk_in_.FreeTensor(raw);\n    Widen(wide, raw, chunk.count);",
        "a stale tensor",
    ),
    Mutation("the chunk skips the queue", TK, "    chunk_in_.EnQue(raw);", "", "DeQue: the queue is empty"),
    Mutation(
        "the chunk is never freed", TK, "    chunk_in_.FreeTensor(raw);\n", "", "with a tensor of a queue not freed"
    ),
    Mutation(
        "forty buffers for chunks",
        TK,
        "InitBuffer(chunk_in_, 2,",
        "InitBuffer(chunk_in_, 40,",
        "the unified buffer overflows",
    ),
    Mutation(
        "padding lanes are not cleared",
        TK,
        "    if (chunk.count % kLanes) {",
        "    if (false) {",
        "that nothing has written",
    ),
    Mutation("no room among equals", TK, "first = k_ - kept;", "first = 0;", "wrong"),
    Mutation(
        "columns count from the chunk's start",
        TK,
        "    if (found) Adds(columns[held_], columns[held_], static_cast<int32_t>(start), "
        "static_cast<int32_t>(found));\n",
        "",
        "wrong",
    ),
    Mutation(
        "the maximum is not subtracted",
        TK,
        "Sub(shares, wide, peak, kLanes, static_cast<uint8_t>(repeats), {1, 1, 0, 8, 8, 0});",
        "Adds(shares, wide, 0.0f, static_cast<int32_t>(repeats * kLanes));",
        "wrong",
    ),
    Mutation(
        "empty slots are not filled",
        TK,
        "    Fill(now_, held_ + static_cast<uint32_t>(found));",
        "    held_ = (held_ + static_cast<uint32_t>(found) + 7) / 8 * 8;",
        "that nothing has written",
    ),
    Mutation(
        "candidates at any address",
        TK,
        "    Fill(now_, held_ + static_cast<uint32_t>(found));",
        "    held_ += static_cast<uint32_t>(found);",
        "are no multiple of 32",
    ),
    Mutation(
        "the threshold never rises",
        TK,
        "    if (held_ > capacity_) Shrink();\n",
        "",
        "elements are kept and the destination has",
    ),
    Mutation("a threshold that fewer than k pass", TK, "if (above >= k_) {", "if (above >= 1) {", "wrong"),
    Mutation(
        "all rows leave their counts in one place",
        TK,
        "counts_[static_cast<uint64_t>(row) * kBlock]",
        "counts_[0]",
        "race between blocks",
    ),
    Mutation("values skip the queue", TK, "      values_out_.EnQue(values);\n", "", "DeQue: the queue is empty"),
    Mutation(
        "a comparison of any length",
        TK,
        "padded_ = (held_ + kLanes - 1) / kLanes * kLanes;",
        "padded_ = held_;",
        "no multiple of 256 bytes",
    ),
]

ALL = {
    "restricted_fwd": RESTRICTED_FWD,
    "restricted_bwd_dh": RESTRICTED_BWD_DH,
    "restricted_bwd_dw": RESTRICTED_BWD_DW,
    "logits_fwd": LOGITS_FWD,
    "logits_bwd": LOGITS_BWD,
    "moclip_stats": MOCLIP_STATS,
    "moclip_update": MOCLIP_UPDATE,
    "topk": TOPK,
}
