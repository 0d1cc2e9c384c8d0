// The first pass of MoClip: (sum m g, sum m^2, sum g^2) of each chunk of a tensor.
#pragma once

#include "chunks.h"

namespace megatron_replay::ascend {

constexpr uint32_t kStatsTile = 4096;  // 64 repeats

template <typename G>
class MoclipStats {
 public:
  __aicore__ inline void Init(GM_ADDR grad, GM_ADDR momentum, GM_ADDR partial, uint64_t length, uint32_t has_momentum) {
    has_momentum_ = has_momentum;
    tiles_.Init(length, kStatsTile);
    grad_.SetGlobalBuffer((__gm__ G*)grad, length);
    momentum_.SetGlobalBuffer((__gm__ float*)momentum, has_momentum ? length : 0);
    partial_.SetGlobalBuffer((__gm__ float*)partial, (length + kChunk - 1) / kChunk * kPartials);
    pipe_.InitBuffer(grad_in_, 2, kStatsTile * sizeof(G));
    if (has_momentum) pipe_.InitBuffer(momentum_in_, 2, kStatsTile * sizeof(float));
    if constexpr (!kWide) pipe_.InitBuffer(grad_wide_, kStatsTile * sizeof(float));
    pipe_.InitBuffer(products_, kSums * kStatsTile * sizeof(float));
    pipe_.InitBuffer(folded_, kSums * kLanes * sizeof(float));
    pipe_.InitBuffer(sums_, kSums * kLanes * sizeof(float));
    pipe_.InitBuffer(partial_out_, 2, kPartials * sizeof(float));
  }

  __aicore__ inline void Process() { OneAhead<FlatTile>(tiles_, *this); }

  __aicore__ inline void Load(const FlatTile& tile) {
    const LocalTensor<G> grad = grad_in_.template AllocTensor<G>();
    FetchFlat(grad, grad_[tile.first], tile.count);
    grad_in_.EnQue(grad);
    if (!has_momentum_) return;
    const LocalTensor<float> momentum = momentum_in_.template AllocTensor<float>();
    FetchFlat(momentum, momentum_[tile.first], tile.count);
    momentum_in_.EnQue(momentum);
  }

  __aicore__ inline void Compute(const FlatTile& tile) {
    const int32_t count = static_cast<int32_t>(tile.count), all = static_cast<int32_t>(kSums * kStatsTile);
    const LocalTensor<float> products = products_.Get<float>(), folded = folded_.Get<float>(),
                             sums = sums_.Get<float>();
    if (tile.opens) Duplicate(sums, 0.0f, static_cast<int32_t>(kSums * kLanes));
    // lanes that no element fills count as nothing
    if (tile.count < kStatsTile || !has_momentum_) Duplicate(products, 0.0f, all);
    PipeBarrier<PIPE_V>();
    LocalTensor<G> raw = grad_in_.template DeQue<G>();
    LocalTensor<float> grad;
    if constexpr (kWide) {
      grad = raw;
    } else {
      grad = grad_wide_.Get<float>();
      Widen(grad, raw, tile.count);
      PipeBarrier<PIPE_V>();
    }
    Mul(products[2 * kStatsTile], grad, grad, count);
    if (has_momentum_) {
      LocalTensor<float> momentum = momentum_in_.template DeQue<float>();
      Mul(products, momentum, grad, count);
      Mul(products[kStatsTile], momentum, momentum, count);
      momentum_in_.FreeTensor(momentum);
    }
    grad_in_.FreeTensor(raw);
    PipeBarrier<PIPE_V>();
    WholeReduceSum(folded, products, static_cast<int32_t>(kLanes), static_cast<int32_t>(kSums * kStatsTile / kLanes), 1,
                   1, 8);
    PipeBarrier<PIPE_V>();
    Add(sums, sums, folded, static_cast<int32_t>(kSums * kLanes));
    PipeBarrier<PIPE_V>();
    if (tile.closes) Close(tile, sums);
  }

 private:
  static constexpr bool kWide = IsSameType<G, float>::value;
  static constexpr uint32_t kSums = 3;

  __aicore__ inline void Close(const FlatTile& tile, const LocalTensor<float>& sums) {
    LocalTensor<float> out = partial_out_.template AllocTensor<float>();
    Duplicate(out, 0.0f, static_cast<int32_t>(kPartials));
    PipeBarrier<PIPE_V>();
    WholeReduceSum(out, sums, static_cast<int32_t>(kLanes), static_cast<int32_t>(kSums), 1, 1, 8);
    partial_out_.EnQue(out);
    out = partial_out_.template DeQue<float>();
    DataCopy(partial_[static_cast<uint64_t>(tile.chunk) * kPartials], out, kPartials);
    partial_out_.FreeTensor(out);
    PipeBarrier<PIPE_V>();
  }

  TPipe pipe_;
  FlatTiles tiles_;
  GlobalTensor<G> grad_;
  GlobalTensor<float> momentum_, partial_;
  TQue<TPosition::VECIN, 2> grad_in_, momentum_in_;
  TQue<TPosition::VECOUT, 1> partial_out_;
  TBuf<TPosition::VECCALC> grad_wide_, products_, folded_, sums_;
  uint32_t has_momentum_;
};

template <typename G>
__aicore__ inline void moclip_stats(GM_ADDR grad, GM_ADDR momentum, GM_ADDR partial, uint64_t length,
                                    uint32_t has_momentum) {
  MoclipStats<G> kernel;
  kernel.Init(grad, momentum, partial, length, has_momentum);
  kernel.Process();
}

}  // namespace megatron_replay::ascend
