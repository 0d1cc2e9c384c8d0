// The gradient of the restricted loss in the logits: (p~ - y) times the position's gradient at the candidates, written one element each.
#pragma once

#include "rows.h"
#include "tables.h"

namespace megatron_replay::ascend {

template <typename T>
class LogitsBwd {
 public:
  __aicore__ inline void Init(GM_ADDR z, GM_ADDR offsets, GM_ADDR columns, GM_ADDR gold, GM_ADDR peak, GM_ADDR factor, GM_ADDR grad,
                              GM_ADDR grad_logits, uint32_t positions, uint32_t vocab, uint32_t candidates) {
    vocab_ = vocab;
    range_ = ListsOfBlock<int64_t>(offsets, positions, candidates);
    z_.SetGlobalBuffer((__gm__ float*)z, candidates);
    grad_logits_.SetGlobalBuffer((__gm__ T*)grad_logits, static_cast<uint64_t>(positions) * vocab);
    offset_table_.Init(pipe_, offsets, static_cast<uint64_t>(positions) + 1);
    offset_table_.Clip(static_cast<uint64_t>(range_.last) + 1);
    column_table_.Init(pipe_, columns, candidates);
    gold_table_.Init(pipe_, gold, positions);
    peak_table_.Init(pipe_, peak, positions);
    factor_table_.Init(pipe_, factor, positions);
    grad_table_.Init(pipe_, grad, positions);
    gold_table_.Clip(range_.last);
    peak_table_.Clip(range_.last);
    factor_table_.Clip(range_.last);
    grad_table_.Clip(range_.last);
    pipe_.InitBuffer(z_in_, 2, kLanes * sizeof(float));
    pipe_.InitBuffer(share_, kLanes * sizeof(float));
    if constexpr (!kWide) pipe_.InitBuffer(rounded_, kLanes * sizeof(T));
    pipe_.InitBuffer(spread_out_, 2, kLanes * kSlot * sizeof(T));
    Duplicate(share_.Get<float>(), 0.0f, static_cast<int32_t>(kLanes));
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void Process() {
    if (range_.first == range_.last) return;
    token_ = range_.first;
    at_ = static_cast<uint64_t>(offset_table_.At(token_));
    column_table_.Clip(EndOf(range_.last - 1));
    end_ = EndOf(token_);
    Tile tile = Take();
    Load(tile);
    while (true) {
      const bool more = token_ < range_.last;
      Tile next{};
      if (more) {
        next = Take();
        Load(next);
      }
      if (tile.count) Compute(tile);
      if (!more) return;
      tile = next;
    }
  }

 private:
  static constexpr bool kWide = IsSameType<T, float>::value;
  static constexpr uint32_t kSlot = 32 / sizeof(T);  // an element leaves from a block of its own

  struct Tile {
    uint32_t token, count;
    uint64_t first;  // candidate
  };

  __aicore__ inline uint64_t EndOf(uint32_t token) { return static_cast<uint64_t>(offset_table_.At(static_cast<uint64_t>(token) + 1)); }

  __aicore__ inline Tile Take() {
    const uint32_t count = static_cast<uint32_t>(Least<uint64_t>(kLanes, end_ - at_));
    const Tile tile{token_, count, at_};
    at_ += count;
    if (at_ == end_ && ++token_ < range_.last) end_ = EndOf(token_);
    return tile;
  }

  __aicore__ inline void Load(const Tile& tile) {
    if (!tile.count) return;
    const LocalTensor<float> z = z_in_.template AllocTensor<float>();
    DataCopyPad(z, z_[tile.first], DataCopyExtParams{1, static_cast<uint32_t>(tile.count * sizeof(float)), 0, 0, 0},
                DataCopyPadExtParams<float>{false, 0, 0, 0.0f});
    z_in_.EnQue(z);
  }

  __aicore__ inline void Compute(const Tile& tile) {
    const int32_t count = static_cast<int32_t>(tile.count);
    LocalTensor<float> z = z_in_.template DeQue<float>();
    const LocalTensor<float> share = share_.Get<float>();
    Adds(share, z, -peak_table_.At(tile.token), count);
    PipeBarrier<PIPE_V>();
    z_in_.FreeTensor(z);
    Exp(share, share, count);
    PipeBarrier<PIPE_V>();
    Muls(share, share, factor_table_.At(tile.token), count);
    PipeBarrier<PIPE_V>();
    const int64_t gold = gold_table_.At(tile.token);
    if (gold >= static_cast<int64_t>(tile.first) && gold < static_cast<int64_t>(tile.first + tile.count)) {
      uint64_t lane[2] = {1ull << (gold - static_cast<int64_t>(tile.first)), 0};
      Adds(share, share, -grad_table_.At(tile.token), lane, 1, {1, 1, 8, 8});
      PipeBarrier<PIPE_V>();
    }
    LocalTensor<T> spread = spread_out_.template AllocTensor<T>();
    const uint8_t repeats = static_cast<uint8_t>((tile.count + kBlock - 1) / kBlock);
    if constexpr (kWide) {
      Brcb(spread, share, repeats, {1, 8});
    } else {
      const LocalTensor<T> rounded = rounded_.template Get<T>();
      Cast(rounded, share, RoundMode::CAST_RINT, repeats * kBlock);
      PipeBarrier<PIPE_V>();
      Brcb(spread, rounded, repeats, {1, 8});
    }
    PipeBarrier<PIPE_V>();
    spread_out_.EnQue(spread);
    spread = spread_out_.template DeQue<T>();
    const GlobalTensor<T> row = grad_logits_[static_cast<uint64_t>(tile.token) * vocab_];
    const DataCopyExtParams one{1, sizeof(T), 0, 0, 0};
    for (uint32_t i = 0; i < tile.count; ++i) {
      DataCopyPad(row[static_cast<uint64_t>(column_table_.At(tile.first + i))], spread[i * kSlot], one);
    }
    spread_out_.FreeTensor(spread);
  }

  TPipe pipe_;
  Window<int64_t> offset_table_, gold_table_;
  Window<int32_t> column_table_;
  Window<float> peak_table_, factor_table_, grad_table_;
  GlobalTensor<float> z_;
  GlobalTensor<T> grad_logits_;
  TQue<TPosition::VECIN, 2> z_in_;
  TQue<TPosition::VECOUT, 1> spread_out_;
  TBuf<TPosition::VECCALC> share_, rounded_;
  Range range_;
  uint64_t at_, end_;
  uint32_t vocab_, token_;
};

template <typename T>
__aicore__ inline void logits_bwd(GM_ADDR z, GM_ADDR offsets, GM_ADDR columns, GM_ADDR gold, GM_ADDR peak, GM_ADDR factor, GM_ADDR grad,
                                  GM_ADDR grad_logits, uint32_t positions, uint32_t vocab, uint32_t candidates) {
  LogitsBwd<T> kernel;
  kernel.Init(z, offsets, columns, gold, peak, factor, grad, grad_logits, positions, vocab, candidates);
  kernel.Process();
}

}  // namespace megatron_replay::ascend
