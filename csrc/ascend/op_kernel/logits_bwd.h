// The gradient of the restricted loss in the logits: (p~ - y) times the position's gradient at the
// candidates, written one element each.
#pragma once

#include "rows.h"
#include "tiles.h"

namespace megatron_replay::ascend {

template <typename T>
class LogitsBwd {
 public:
  __aicore__ inline void Init(GM_ADDR z, GM_ADDR offsets, GM_ADDR columns, GM_ADDR gold, GM_ADDR targets,
                              GM_ADDR peak, GM_ADDR factor, GM_ADDR grad, GM_ADDR grad_logits, uint32_t positions,
                              uint32_t vocab, uint32_t candidates, uint32_t soft) {
    vocab_ = vocab;
    soft_ = soft;
    z_.SetGlobalBuffer((__gm__ float*)z, candidates);
    grad_logits_.SetGlobalBuffer((__gm__ T*)grad_logits, static_cast<uint64_t>(positions) * vocab);
    tiles_.Init(pipe_, offsets, positions, candidates, kLanes);
    column_table_.Init(pipe_, columns, candidates);
    gold_table_.Init(pipe_, gold, positions);
    peak_table_.Init(pipe_, peak, positions);
    factor_table_.Init(pipe_, factor, positions);
    grad_table_.Init(pipe_, grad, positions);
    gold_table_.Clip(tiles_.Last());
    peak_table_.Clip(tiles_.Last());
    factor_table_.Clip(tiles_.Last());
    grad_table_.Clip(tiles_.Last());
    pipe_.InitBuffer(z_in_, 2, kLanes * sizeof(float));
    pipe_.InitBuffer(share_, kLanes * sizeof(float));
    if (soft) target_tiles_.Init(pipe_, targets, candidates, kLanes);
    if constexpr (!kWide) pipe_.InitBuffer(rounded_, kLanes * sizeof(T));
    pipe_.InitBuffer(spread_out_, 2, kLanes * kSlot * sizeof(T));
    Duplicate(share_.Get<float>(), 0.0f, static_cast<int32_t>(kLanes));
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void Process() {
    if (!tiles_.More()) return;
    column_table_.Clip(tiles_.Begin());
    OneAhead<ListTile>(tiles_, *this);
  }

  __aicore__ inline void Load(const ListTile& tile) {
    if (!tile.count) return;
    const LocalTensor<float> z = z_in_.template AllocTensor<float>();
    DataCopyPad(z, z_[tile.first], DataCopyExtParams{1, static_cast<uint32_t>(tile.count * sizeof(float)), 0, 0, 0},
                DataCopyPadExtParams<float>{false, 0, 0, 0.0f});
    z_in_.EnQue(z);
    if (soft_) target_tiles_.Load(tile);
  }

  __aicore__ inline void Compute(const ListTile& tile) {
    if (!tile.count) return;
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
    if (soft_) {
      LocalTensor<float> targets = target_tiles_.Take();
      Axpy(share, targets, -grad_table_.At(tile.token), count);
      PipeBarrier<PIPE_V>();
      target_tiles_.Free(targets);
    }
    const int64_t gold = soft_ ? -1 : gold_table_.At(tile.token);
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

 private:
  static constexpr bool kWide = IsSameType<T, float>::value;
  static constexpr uint32_t kSlot = 32 / sizeof(T);  // an element leaves from a block of its own

  TPipe pipe_;
  ListTiles tiles_;
  TargetTiles target_tiles_;
  Window<int64_t> gold_table_;
  Window<int32_t> column_table_;
  Window<float> peak_table_, factor_table_, grad_table_;
  GlobalTensor<float> z_;
  GlobalTensor<T> grad_logits_;
  TQue<TPosition::VECIN, 2> z_in_;
  TQue<TPosition::VECOUT, 1> spread_out_;
  TBuf<TPosition::VECCALC> share_, rounded_;
  uint32_t vocab_, soft_;
};

template <typename T>
__aicore__ inline void logits_bwd(GM_ADDR z, GM_ADDR offsets, GM_ADDR columns, GM_ADDR gold, GM_ADDR targets,
                                  GM_ADDR peak, GM_ADDR factor, GM_ADDR grad, GM_ADDR grad_logits, uint32_t positions,
                                  uint32_t vocab, uint32_t candidates, uint32_t soft) {
  LogitsBwd<T> kernel;
  kernel.Init(z, offsets, columns, gold, targets, peak, factor, grad, grad_logits, positions, vocab, candidates, soft);
  kernel.Process();
}

}  // namespace megatron_replay::ascend
