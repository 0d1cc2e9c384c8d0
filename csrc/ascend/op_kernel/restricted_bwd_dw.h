// The gradient of the weight, row by row: the entries of the candidate lists come sorted by column, and a row is the
// sum of its entries in that order, added to the gradient once.
//
// A column that is in most lists would keep one core busy while the others wait. So a row is summed in parts of kPart
// entries, whatever the number of blocks. Rows of more than one part go through a workspace, and
// restricted_bwd_dw_merge adds their parts up. There are no atomics, so the bits are the same every time.
#pragma once

#include "rows.h"
#include "tables.h"

namespace megatron_replay::ascend {

constexpr uint32_t kPart = 64;  // entries

// Rows of the workspace: parts after the first lie at their first entry / kPart, first parts behind all those. Two rows
// of several parts begin more than kPart entries apart, so nothing lies on anything else.
__aicore__ inline uint32_t PartSlot(uint32_t start, uint32_t part, uint32_t entries) {
  const uint32_t slot = start / kPart + part;
  return part ? slot : slot + (entries + kPart - 1) / kPart;
}

// A row of the gradient: reads it where it is to be added to, and writes it back.
template <typename G>
class GradientRow {
 public:
  __aicore__ inline void Init(TPipe& pipe, GM_ADDR grad, uint64_t rows, uint32_t width, uint32_t add) {
    grad_.SetGlobalBuffer((__gm__ G*)grad, rows * width);
    width_ = width;
    add_ = add;
    if (add) pipe.InitBuffer(before_, 2, width * sizeof(G));
    if constexpr (!kWide) {
      pipe.InitBuffer(rounded_, 1, width * sizeof(G));
      pipe.InitBuffer(wide_, width * sizeof(float));
    }
  }

  __aicore__ inline void Load(uint32_t row) {
    if (!add_) return;
    const LocalTensor<G> before = before_.template AllocTensor<G>();
    DataCopy(before, grad_[static_cast<uint64_t>(row) * width_], width_);
    before_.EnQue(before);
  }

  // row <- row + sum, or sum; `sums` is the queue the sum was allocated from.
  template <typename Queue>
  __aicore__ inline void Store(uint32_t row, LocalTensor<float>& sum, Queue& sums) {
    if (add_) {
      LocalTensor<G> before = before_.template DeQue<G>();
      if constexpr (kWide) {
        Add(sum, sum, before, static_cast<int32_t>(width_));
      } else {
        const LocalTensor<float> wide = wide_.template Get<float>();
        Widen(wide, before, width_);
        PipeBarrier<PIPE_V>();
        Add(sum, sum, wide, static_cast<int32_t>(width_));
      }
      PipeBarrier<PIPE_V>();
      before_.FreeTensor(before);
    }
    const GlobalTensor<G> target = grad_[static_cast<uint64_t>(row) * width_];
    if constexpr (kWide) {
      sums.EnQue(sum);
      sum = sums.template DeQue<float>();
      DataCopy(target, sum, width_);
      sums.FreeTensor(sum);
    } else {
      LocalTensor<G> rounded = rounded_.template AllocTensor<G>();
      Cast(rounded, sum, RoundMode::CAST_RINT, width_);
      PipeBarrier<PIPE_V>();
      sums.EnQue(sum);
      sum = sums.template DeQue<float>();
      sums.FreeTensor(sum);
      rounded_.EnQue(rounded);
      rounded = rounded_.template DeQue<G>();
      DataCopy(target, rounded, width_);
      rounded_.FreeTensor(rounded);
    }
  }

 private:
  static constexpr bool kWide = IsSameType<G, float>::value;

  GlobalTensor<G> grad_;
  TQue<TPosition::VECIN, 2> before_;
  TQue<TPosition::VECOUT, 1> rounded_;
  TBuf<TPosition::VECCALC> wide_;
  uint32_t width_, add_;
};

template <typename T, typename G>
class RestrictedBwdDw {
 public:
  __aicore__ inline void Init(GM_ADDR hidden, GM_ADDR starts, GM_ADDR touched, GM_ADDR tokens, GM_ADDR coefficient,
                              GM_ADDR grad, GM_ADDR parts, uint32_t positions, uint32_t width, uint32_t num_touched,
                              uint32_t entries, uint32_t vocab, uint32_t add, uint32_t rows, uint32_t outs) {
    width_ = width;
    rows_ = rows;
    entries_ = entries;
    num_touched_ = num_touched;
    add_ = add;
    starts_.SetGlobalBuffer((__gm__ int32_t*)starts, static_cast<uint64_t>(num_touched) + 1);
    hidden_.SetGlobalBuffer((__gm__ T*)hidden, static_cast<uint64_t>(positions) * width);
    parts_.SetGlobalBuffer((__gm__ float*)parts, static_cast<uint64_t>((entries + kPart - 1) / kPart) * 2 * width);
    const uint64_t work = static_cast<uint64_t>(entries) + num_touched, block = GetBlockIdx(), blocks = GetBlockNum();
    at_ = PartFrom(work * block / blocks);
    end_ = PartFrom(work * (block + 1) / blocks);
    start_table_.Init(pipe_, starts, static_cast<uint64_t>(num_touched) + 1);
    touched_table_.Init(pipe_, touched, num_touched);
    token_table_.Init(pipe_, tokens, entries);
    factor_table_.Init(pipe_, coefficient, entries);
    const uint32_t behind = Least(end_.row + (end_.part ? 1 : 0), num_touched);  // rows of this block end there
    start_table_.Clip(static_cast<uint64_t>(behind) + 1);
    touched_table_.Clip(behind);
    pipe_.InitBuffer(hidden_in_, 2, rows * width * sizeof(T));
    if constexpr (!kWide) pipe_.InitBuffer(hidden_wide_, rows * width * sizeof(float));
    pipe_.InitBuffer(sums_, outs, width * sizeof(float));
    gradient_.Init(pipe_, grad, add ? vocab : num_touched, width, add);
  }

  __aicore__ inline void Process() {
    if (!(at_ < end_)) return;
    OpenPart();
    ClipEntries();
    Tile tile = Take();
    Load(tile);
    while (true) {
      const bool more = at_ < end_;
      Tile next{};
      if (more) {
        next = Take();
        Load(next);
      }
      Compute(tile);
      if (!more) return;
      tile = next;
    }
  }

 private:
  static constexpr bool kWide = IsSameType<T, float>::value;

  struct Part {
    uint32_t row, part;
    __aicore__ inline bool operator<(const Part& other) const {
      return row < other.row || (row == other.row && part < other.part);
    }
  };

  struct Tile {
    uint32_t first, count;  // entries
    uint32_t target;        // row of the gradient, or of the workspace
    bool opens, closes, whole;
  };

  // The first part whose beginning in the work, starts[row] + row + kPart part, is not before `work`.
  __aicore__ inline Part PartFrom(uint64_t work) {
    const uint32_t row = FirstFrom(starts_, num_touched_, work);
    if (row == 0) return {0, 0};
    const uint32_t before = row - 1;
    const uint32_t start = static_cast<uint32_t>(starts_.GetValue(before)),
                   stop = static_cast<uint32_t>(starts_.GetValue(row));
    const uint64_t place = static_cast<uint64_t>(start) + before;
    const uint64_t part = (work - place + kPart - 1) / kPart;
    return part * kPart < stop - start ? Part{before, static_cast<uint32_t>(part)} : Part{row, 0};
  }

  __aicore__ inline void OpenPart() {
    start_ = static_cast<uint32_t>(start_table_.At(at_.row));
    stop_ = static_cast<uint32_t>(start_table_.At(static_cast<uint64_t>(at_.row) + 1));
    entry_ = start_ + at_.part * kPart;
    part_end_ = Least(entry_ + kPart, stop_);
  }

  __aicore__ inline void ClipEntries() {
    const uint32_t last =
        end_.row < num_touched_ ? static_cast<uint32_t>(starts_.GetValue(end_.row)) + end_.part * kPart : entries_;
    token_table_.Clip(last);
    factor_table_.Clip(last);
  }

  __aicore__ inline Tile Take() {
    Tile tile;
    tile.first = entry_;
    tile.count = Least(rows_, part_end_ - entry_);
    tile.opens = entry_ == start_ + at_.part * kPart;
    tile.closes = entry_ + tile.count == part_end_;
    tile.whole = stop_ - start_ <= kPart;
    tile.target = !tile.whole ? PartSlot(start_, at_.part, entries_)
                  : add_      ? static_cast<uint32_t>(touched_table_.At(at_.row))
                              : at_.row;
    entry_ += tile.count;
    if (tile.closes) {
      at_ = part_end_ == stop_ ? Part{at_.row + 1, 0} : Part{at_.row, at_.part + 1};
      if (at_ < end_) OpenPart();
    }
    return tile;
  }

  __aicore__ inline void Load(const Tile& tile) {
    const LocalTensor<T> raw = hidden_in_.template AllocTensor<T>();
    for (uint32_t i = 0; i < tile.count; ++i) {
      DataCopy(raw[i * width_], hidden_[static_cast<uint64_t>(token_table_.At(tile.first + i)) * width_], width_);
    }
    hidden_in_.EnQue(raw);
    if (tile.closes && tile.whole) gradient_.Load(tile.target);
  }

  __aicore__ inline void Compute(const Tile& tile) {
    LocalTensor<T> raw = hidden_in_.template DeQue<T>();
    LocalTensor<float> wide;
    if constexpr (kWide) {
      wide = raw;
    } else {
      wide = hidden_wide_.Get<float>();
      Widen(wide, raw, tile.count * width_);
      PipeBarrier<PIPE_V>();
      hidden_in_.FreeTensor(raw);
    }
    if (tile.opens) sum_ = sums_.template AllocTensor<float>();
    for (uint32_t i = 0; i < tile.count; ++i) {
      const float factor = factor_table_.At(tile.first + i);
      if (i == 0 && tile.opens) {
        Muls(sum_, wide, factor, static_cast<int32_t>(width_));
      } else {
        Axpy(sum_, wide[i * width_], factor, static_cast<int32_t>(width_));
      }
      PipeBarrier<PIPE_V>();
    }
    if constexpr (kWide) hidden_in_.FreeTensor(raw);
    if (!tile.closes) return;
    if (tile.whole) {
      gradient_.Store(tile.target, sum_, sums_);
    } else {
      sums_.EnQue(sum_);
      sum_ = sums_.template DeQue<float>();
      DataCopy(parts_[static_cast<uint64_t>(tile.target) * width_], sum_, width_);
      sums_.FreeTensor(sum_);
    }
  }

  TPipe pipe_;
  Window<int32_t> start_table_, touched_table_, token_table_;
  Window<float> factor_table_;
  GlobalTensor<int32_t> starts_;
  GlobalTensor<T> hidden_;
  GlobalTensor<float> parts_;
  TQue<TPosition::VECIN, 2> hidden_in_;
  TQue<TPosition::VECOUT, 1> sums_;
  TBuf<TPosition::VECCALC> hidden_wide_;
  GradientRow<G> gradient_;
  LocalTensor<float> sum_;
  Part at_, end_;
  uint32_t width_, rows_, entries_, num_touched_, add_;
  uint32_t start_, stop_, entry_, part_end_;
};

// Adds up the parts of the rows that have several, in their order.
template <typename G>
class RestrictedBwdDwMerge {
 public:
  __aicore__ inline void Init(GM_ADDR starts, GM_ADDR touched, GM_ADDR grad, GM_ADDR parts, uint32_t width,
                              uint32_t num_touched, uint32_t entries, uint32_t vocab, uint32_t add) {
    width_ = width;
    entries_ = entries;
    add_ = add;
    range_ = ListsOfBlock<int32_t>(starts, num_touched, entries);
    parts_.SetGlobalBuffer((__gm__ float*)parts, static_cast<uint64_t>((entries + kPart - 1) / kPart) * 2 * width);
    start_table_.Init(pipe_, starts, static_cast<uint64_t>(num_touched) + 1);
    touched_table_.Init(pipe_, touched, num_touched);
    start_table_.Clip(static_cast<uint64_t>(range_.last) + 1);
    touched_table_.Clip(range_.last);
    pipe_.InitBuffer(parts_in_, 2, width * sizeof(float));
    pipe_.InitBuffer(sums_, 1, width * sizeof(float));
    gradient_.Init(pipe_, grad, add ? vocab : num_touched, width, add);
  }

  __aicore__ inline void Process() {
    for (uint32_t row = range_.first; row < range_.last; ++row) {
      const uint32_t start = static_cast<uint32_t>(start_table_.At(row));
      const uint32_t count = static_cast<uint32_t>(start_table_.At(static_cast<uint64_t>(row) + 1)) - start;
      if (count > kPart) Merge(row, start, (count + kPart - 1) / kPart);
    }
  }

 private:
  __aicore__ inline void Merge(uint32_t row, uint32_t start, uint32_t num_parts) {
    const uint32_t target = add_ ? static_cast<uint32_t>(touched_table_.At(row)) : row;
    gradient_.Load(target);
    LocalTensor<float> sum = sums_.template AllocTensor<float>();
    Load(start, 0);
    for (uint32_t part = 0; part < num_parts; ++part) {
      if (part + 1 < num_parts) Load(start, part + 1);
      LocalTensor<float> some = parts_in_.template DeQue<float>();
      if (part == 0) {
        Muls(sum, some, 1.0f, static_cast<int32_t>(width_));
      } else {
        Add(sum, sum, some, static_cast<int32_t>(width_));
      }
      PipeBarrier<PIPE_V>();
      parts_in_.FreeTensor(some);
    }
    gradient_.Store(target, sum, sums_);
  }

  __aicore__ inline void Load(uint32_t start, uint32_t part) {
    const LocalTensor<float> some = parts_in_.template AllocTensor<float>();
    DataCopy(some, parts_[static_cast<uint64_t>(PartSlot(start, part, entries_)) * width_], width_);
    parts_in_.EnQue(some);
  }

  TPipe pipe_;
  Window<int32_t> start_table_, touched_table_;
  GlobalTensor<float> parts_;
  TQue<TPosition::VECIN, 2> parts_in_;
  TQue<TPosition::VECOUT, 1> sums_;
  GradientRow<G> gradient_;
  Range range_;
  uint32_t width_, entries_, add_;
};

template <typename T, typename G>
__aicore__ inline void restricted_bwd_dw(GM_ADDR hidden, GM_ADDR starts, GM_ADDR touched, GM_ADDR tokens,
                                         GM_ADDR coefficient, GM_ADDR grad, GM_ADDR parts, uint32_t positions,
                                         uint32_t width, uint32_t num_touched, uint32_t entries, uint32_t vocab,
                                         uint32_t add, uint32_t rows, uint32_t outs) {
  RestrictedBwdDw<T, G> kernel;
  kernel.Init(hidden, starts, touched, tokens, coefficient, grad, parts, positions, width, num_touched, entries, vocab,
              add, rows, outs);
  kernel.Process();
}

template <typename G>
__aicore__ inline void restricted_bwd_dw_merge(GM_ADDR starts, GM_ADDR touched, GM_ADDR grad, GM_ADDR parts,
                                               uint32_t width, uint32_t num_touched, uint32_t entries, uint32_t vocab,
                                               uint32_t add) {
  RestrictedBwdDwMerge<G> kernel;
  kernel.Init(starts, touched, grad, parts, width, num_touched, entries, vocab, add);
  kernel.Process();
}

}  // namespace megatron_replay::ascend
