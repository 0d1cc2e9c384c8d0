// z, softmax statistics and mixtures of the restricted loss: one dot product for each
// candidate, each weight row read once. `soft`: with targets; then gold is not read.
//
// The block walks over tiles of up to `rows` candidates of one position. While the vector pipe works on a tile, the
// rows of the next one arrive (two buffers). Nothing that the scalar pipe needs comes from the vector pipe, so the
// program never waits for it.
#pragma once

#include "rows.h"
#include "softmax_state.h"
#include "tiles.h"

namespace megatron_replay::ascend {

// Dot products are folded to this many lanes before they are reduced.
constexpr uint32_t kFold = 1024;
constexpr uint32_t kFoldUnit = 512;  // so that the partial sums of a row fill whole blocks

template <typename T>
class RestrictedFwd {
 public:
  __aicore__ inline void Init(GM_ADDR hidden, GM_ADDR weight, GM_ADDR offsets, GM_ADDR columns, GM_ADDR gold,
                              GM_ADDR targets, GM_ADDR z, GM_ADDR stats, GM_ADDR mixture, GM_ADDR target_mixture,
                              uint32_t positions, uint32_t width, uint32_t candidates, uint32_t vocab, uint32_t mix,
                              uint32_t soft, uint32_t rows, uint32_t outs) {
    width_ = width;
    mix_ = mix;
    soft_ = soft;
    fold_ = Least(kFold, (width + kFoldUnit - 1) / kFoldUnit * kFoldUnit);
    hidden_.SetGlobalBuffer((__gm__ T*)hidden, static_cast<uint64_t>(positions) * width);
    weight_.SetGlobalBuffer((__gm__ T*)weight, static_cast<uint64_t>(vocab) * width);
    z_.SetGlobalBuffer((__gm__ float*)z, candidates);
    tiles_.Init(pipe_, offsets, positions, candidates, rows);
    column_table_.Init(pipe_, columns, candidates);
    gold_table_.Init(pipe_, gold, positions);
    gold_table_.Clip(tiles_.Last());
    pipe_.InitBuffer(hidden_in_, 1, width * sizeof(T));
    pipe_.InitBuffer(hidden_wide_, width * sizeof(float));
    pipe_.InitBuffer(rows_in_, 2, rows * width * sizeof(T));
    if constexpr (!kWide) pipe_.InitBuffer(rows_wide_, rows * width * sizeof(float));
    pipe_.InitBuffer(products_, rows * fold_ * sizeof(float));
    pipe_.InitBuffer(sums_, rows * (fold_ / kLanes) * sizeof(float));
    pipe_.InitBuffer(z_out_, 2, kMaxTile * sizeof(float));
    state_.Init(pipe_, stats, positions);
    if (mix) {
      mixture_.SetGlobalBuffer((__gm__ float*)mixture, static_cast<uint64_t>(positions) * width);
      pipe_.InitBuffer(mixture_out_, outs, width * sizeof(float));
      pipe_.InitBuffer(factors_, 2 * kLanes * sizeof(float));
    }
    if (soft) target_tiles_.Init(pipe_, targets, candidates, kMaxTile);
    if (mix && soft) {
      target_mixture_.SetGlobalBuffer((__gm__ float*)target_mixture, static_cast<uint64_t>(positions) * width);
      pipe_.InitBuffer(target_out_, outs, width * sizeof(float));
      pipe_.InitBuffer(target_factors_, 2 * kLanes * sizeof(float));
    }
    // lanes beyond a row's width are never written again
    Duplicate(products_.Get<float>(), 0.0f, static_cast<int32_t>(rows * fold_));
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void Process() {
    if (!tiles_.More()) return;
    column_table_.Clip(tiles_.Begin());
    ListTile tile = tiles_.Take();
    Load(tile);
    while (true) {
      if (tile.opens) Open(tile);  // before the next position's hidden state comes into the one buffer there is
      const bool more = tiles_.More();
      ListTile next{};
      if (more) {
        next = tiles_.Take();
        Load(next);
      }
      if (tile.count) Compute(tile);
      if (tile.closes) Close(tile);
      if (!more) return;
      tile = next;
    }
  }

 private:
  static constexpr bool kWide = IsSameType<T, float>::value;

  __aicore__ inline void Load(const ListTile& tile) {
    if (!tile.count) return;
    if (tile.opens) {
      const LocalTensor<T> raw = hidden_in_.template AllocTensor<T>();
      DataCopy(raw, hidden_[static_cast<uint64_t>(tile.token) * width_], width_);
      hidden_in_.EnQue(raw);
    }
    const LocalTensor<T> raw = rows_in_.template AllocTensor<T>();
    for (uint32_t i = 0; i < tile.count; ++i) {
      DataCopy(raw[i * width_], weight_[static_cast<uint64_t>(column_table_.At(tile.first + i)) * width_], width_);
    }
    rows_in_.EnQue(raw);
    if (soft_) target_tiles_.Load(tile);
  }

  __aicore__ inline void Open(const ListTile& tile) {
    state_.Open();
    gold_ = soft_ ? -1 : gold_table_.At(tile.token);
    if (mix_) mixture_row_ = mixture_out_.template AllocTensor<float>();
    if (mix_ && soft_) target_row_ = target_out_.template AllocTensor<float>();
    if (!tile.count) return;
    LocalTensor<T> raw = hidden_in_.template DeQue<T>();
    Widen(hidden_wide_.Get<float>(), raw, width_);
    PipeBarrier<PIPE_V>();
    hidden_in_.FreeTensor(raw);
  }

  __aicore__ inline void Compute(const ListTile& tile) {
    LocalTensor<T> raw = rows_in_.template DeQue<T>();
    LocalTensor<float> wide;
    if constexpr (kWide) {
      wide = raw;
    } else {
      wide = rows_wide_.Get<float>();
      Widen(wide, raw, tile.count * width_);
      PipeBarrier<PIPE_V>();
      rows_in_.FreeTensor(raw);
    }
    LocalTensor<float> z = z_out_.template AllocTensor<float>();
    Dot(z, wide, tile.count);
    LocalTensor<float> targets;
    if (soft_) {
      targets = target_tiles_.Take();
      state_.Aim(z, targets, tile.count);
    }
    state_.Add(z, tile.count);
    if (gold_ >= static_cast<int64_t>(tile.first) && gold_ < static_cast<int64_t>(tile.first + tile.count)) {
      state_.Gold(z, static_cast<uint32_t>(gold_ - tile.first));
    }
    z_out_.EnQue(z);
    if (mix_) Mix(wide, targets, tile);
    if (soft_) target_tiles_.Free(targets);
    if constexpr (kWide) rows_in_.FreeTensor(raw);
    z = z_out_.template DeQue<float>();
    DataCopyPad(z_[tile.first], z, DataCopyExtParams{1, static_cast<uint32_t>(tile.count * sizeof(float)), 0, 0, 0});
    z_out_.FreeTensor(z);
  }

  // z[i] = row i . hidden. The order of the additions depends on the width only.
  __aicore__ inline void Dot(const LocalTensor<float>& z, const LocalTensor<float>& wide, uint32_t count) {
    const LocalTensor<float> products = products_.Get<float>(), sums = sums_.Get<float>(),
                             hidden = hidden_wide_.Get<float>();
    for (uint32_t start = 0; start < width_; start += fold_) {
      const int32_t lanes = static_cast<int32_t>(Least(fold_, width_ - start));
      for (uint32_t i = 0; i < count; ++i) {
        if (start == 0) {
          Mul(products[i * fold_], wide[i * width_], hidden, lanes);
        } else {
          MulAddDst(products[i * fold_], wide[i * width_ + start], hidden[start], lanes);
        }
      }
      PipeBarrier<PIPE_V>();
    }
    const int32_t parts = static_cast<int32_t>(fold_ / kLanes);
    WholeReduceSum(sums, products, static_cast<int32_t>(kLanes), static_cast<int32_t>(count) * parts, 1, 1, 8);
    PipeBarrier<PIPE_V>();
    WholeReduceSum(z, sums, parts, static_cast<int32_t>(count), 1, 1, parts / static_cast<int32_t>(kBlock));
    PipeBarrier<PIPE_V>();
  }

  // mixture <- fade mixture + sum of exp(z - max) row, and target mixture <- target mixture + sum of y row.
  __aicore__ inline void Mix(const LocalTensor<float>& wide, const LocalTensor<float>& targets, const ListTile& tile) {
    const LocalTensor<float> factors = factors_.Get<float>();
    const uint8_t blocks = static_cast<uint8_t>((tile.count + kBlock - 1) / kBlock);
    Brcb(factors, state_.Shares(), blocks, {1, 8});
    if (soft_) Brcb(target_factors_.Get<float>(), targets, blocks, {1, 8});
    if (!tile.opens) ScaleRow(mixture_row_, mixture_row_, state_.Fade(), width_);
    PipeBarrier<PIPE_V>();
    for (uint32_t i = 0; i < tile.count; ++i) {
      if (i == 0 && tile.opens) {
        ScaleRow(mixture_row_, wide, factors, width_);
      } else {
        AddScaledRow(mixture_row_, wide[i * width_], factors[i * kBlock], width_);
      }
      if (soft_) MixTarget(wide[i * width_], i, tile.opens);
      PipeBarrier<PIPE_V>();
    }
  }

  __aicore__ inline void MixTarget(const LocalTensor<float>& row, uint32_t i, bool opens) {
    const LocalTensor<float> factors = target_factors_.Get<float>();
    if (i == 0 && opens) {
      ScaleRow(target_row_, row, factors, width_);
    } else {
      AddScaledRow(target_row_, row, factors[i * kBlock], width_);
    }
  }

  __aicore__ inline void Close(const ListTile& tile) {
    state_.Close(tile.token);
    if (mix_) Send(mixture_, mixture_out_, mixture_row_, tile);
    if (mix_ && soft_) Send(target_mixture_, target_out_, target_row_, tile);
  }

  __aicore__ inline void Send(const GlobalTensor<float>& rows, TQue<TPosition::VECOUT, 1>& out,
                              LocalTensor<float>& row, const ListTile& tile) {
    if (!tile.count) Duplicate(row, 0.0f, static_cast<int32_t>(width_));
    out.EnQue(row);
    row = out.template DeQue<float>();
    DataCopy(rows[static_cast<uint64_t>(tile.token) * width_], row, width_);
    out.FreeTensor(row);
  }

  TPipe pipe_;
  ListTiles tiles_;
  Window<int64_t> gold_table_;
  Window<int32_t> column_table_;
  GlobalTensor<T> hidden_, weight_;
  TargetTiles target_tiles_;
  GlobalTensor<float> z_, mixture_, target_mixture_;
  TQue<TPosition::VECIN, 1> hidden_in_;
  TQue<TPosition::VECIN, 2> rows_in_;
  TQue<TPosition::VECOUT, 1> z_out_, mixture_out_, target_out_;
  TBuf<TPosition::VECCALC> hidden_wide_, rows_wide_, products_, sums_, factors_, target_factors_;
  SoftmaxState state_;
  LocalTensor<float> mixture_row_, target_row_;
  int64_t gold_;
  uint32_t width_, mix_, soft_, fold_;
};

template <typename T>
__aicore__ inline void restricted_fwd(GM_ADDR hidden, GM_ADDR weight, GM_ADDR offsets, GM_ADDR columns, GM_ADDR gold,
                                      GM_ADDR targets, GM_ADDR z, GM_ADDR stats, GM_ADDR mixture,
                                      GM_ADDR target_mixture, uint32_t positions, uint32_t width, uint32_t candidates,
                                      uint32_t vocab, uint32_t mix, uint32_t soft, uint32_t rows, uint32_t outs) {
  RestrictedFwd<T> kernel;
  kernel.Init(hidden, weight, offsets, columns, gold, targets, z, stats, mixture, target_mixture, positions, width,
              candidates, vocab, mix, soft, rows, outs);
  kernel.Process();
}

}  // namespace megatron_replay::ascend
