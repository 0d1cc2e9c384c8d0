// The restricted loss from given logits: the kernel picks the candidates' logits, one element each, and takes their
// softmax statistics.
#pragma once

#include "softmax_state.h"
#include "tiles.h"

namespace megatron_replay::ascend {

template <typename T>
class LogitsFwd {
 public:
  __aicore__ inline void Init(GM_ADDR logits, GM_ADDR offsets, GM_ADDR columns, GM_ADDR gold, GM_ADDR targets,
                              GM_ADDR z, GM_ADDR stats, uint32_t positions, uint32_t vocab, uint32_t stride,
                              uint32_t candidates, uint32_t soft) {
    stride_ = stride;
    soft_ = soft;
    logits_.SetGlobalBuffer((__gm__ T*)logits, positions ? static_cast<uint64_t>(positions - 1) * stride + vocab : 0);
    z_.SetGlobalBuffer((__gm__ float*)z, candidates);
    tiles_.Init(pipe_, offsets, positions, candidates, kMaxTile);
    column_table_.Init(pipe_, columns, candidates);
    gold_table_.Init(pipe_, gold, positions);
    gold_table_.Clip(tiles_.Last());
    pipe_.InitBuffer(picked_in_, 2, kMaxTile * kSlot * sizeof(T));
    pipe_.InitBuffer(wide_, kMaxTile * kSlot * sizeof(float));
    pipe_.InitBuffer(slots_, kMaxTile * sizeof(int32_t));
    pipe_.InitBuffer(z_out_, 2, kMaxTile * sizeof(float));
    state_.Init(pipe_, stats, positions);
    if (soft) target_tiles_.Init(pipe_, targets, candidates, kMaxTile);
    // where in the buffer, in bytes, the tile's elements lie
    const LocalTensor<int32_t> slots = slots_.Get<int32_t>();
    CreateVecIndex(slots, 0, kMaxTile);
    PipeBarrier<PIPE_V>();
    Muls(slots, slots, static_cast<int32_t>(kSlot * sizeof(float)), static_cast<int32_t>(kMaxTile));
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void Process() {
    if (!tiles_.More()) return;
    column_table_.Clip(tiles_.Begin());
    OneAhead<ListTile>(tiles_, *this);
  }

  __aicore__ inline void Load(const ListTile& tile) {
    if (!tile.count) return;
    const LocalTensor<T> picked = picked_in_.template AllocTensor<T>();
    const DataCopyExtParams one{1, sizeof(T), 0, 0, 0};
    const DataCopyPadExtParams<T> unpadded{false, 0, 0, T{}};  // the rest of the block repeats the element
    const GlobalTensor<T> row = logits_[static_cast<uint64_t>(tile.token) * stride_];
    for (uint32_t i = 0; i < tile.count; ++i) {
      DataCopyPad(picked[i * kSlot], row[static_cast<uint64_t>(column_table_.At(tile.first + i))], one, unpadded);
    }
    picked_in_.EnQue(picked);
    if (soft_) target_tiles_.Load(tile);
  }

  __aicore__ inline void Compute(const ListTile& tile) {
    if (tile.opens) state_.Open();
    if (tile.count) Add(tile);
    if (tile.closes) state_.Close(tile.token);
  }

 private:
  static constexpr uint32_t kSlot = 32 / sizeof(T);  // an element arrives in a block of its own

  __aicore__ inline void Add(const ListTile& tile) {
    LocalTensor<T> picked = picked_in_.template DeQue<T>();
    const LocalTensor<float> wide = wide_.Get<float>();
    Widen(wide, picked, tile.count * kSlot);
    PipeBarrier<PIPE_V>();
    picked_in_.FreeTensor(picked);
    LocalTensor<float> z = z_out_.template AllocTensor<float>();
    Gather(z, wide, slots_.Get<uint32_t>(), 0, tile.count);
    PipeBarrier<PIPE_V>();
    if (soft_) {
      LocalTensor<float> targets = target_tiles_.Take();
      state_.Aim(z, targets, tile.count);
      target_tiles_.Free(targets);
    }
    state_.Add(z, tile.count);
    const int64_t gold = soft_ ? -1 : gold_table_.At(tile.token);
    if (gold >= static_cast<int64_t>(tile.first) && gold < static_cast<int64_t>(tile.first + tile.count)) {
      state_.Gold(z, static_cast<uint32_t>(gold - tile.first));
    }
    z_out_.EnQue(z);
    z = z_out_.template DeQue<float>();
    DataCopyPad(z_[tile.first], z, DataCopyExtParams{1, static_cast<uint32_t>(tile.count * sizeof(float)), 0, 0, 0});
    z_out_.FreeTensor(z);
  }

  TPipe pipe_;
  ListTiles tiles_;
  TargetTiles target_tiles_;
  Window<int64_t> gold_table_;
  Window<int32_t> column_table_;
  GlobalTensor<T> logits_;
  GlobalTensor<float> z_;
  TQue<TPosition::VECIN, 2> picked_in_;
  TQue<TPosition::VECOUT, 1> z_out_;
  TBuf<TPosition::VECCALC> wide_, slots_;
  SoftmaxState state_;
  uint32_t stride_, soft_;
};

template <typename T>
__aicore__ inline void logits_fwd(GM_ADDR logits, GM_ADDR offsets, GM_ADDR columns, GM_ADDR gold,
                                  GM_ADDR targets, GM_ADDR z, GM_ADDR stats, uint32_t positions, uint32_t vocab,
                                  uint32_t stride, uint32_t candidates, uint32_t soft) {
  LogitsFwd<T> kernel;
  kernel.Init(logits, offsets, columns, gold, targets, z, stats, positions, vocab, stride, candidates, soft);
  kernel.Process();
}

}  // namespace megatron_replay::ascend
