// Maximum, sum of exponentials and sum y z (or gold logit) of a position while its logits arrive in tiles. All of it
// stays on the vector pipe: every number fills a block of eight lanes, so that it can be an operand without
// passing through the scalar pipe.
#pragma once

#include "rows.h"

namespace megatron_replay::ascend {

constexpr float kNoMaximum = -3.0e38f;  // of no logits: finite, so that exp(kNoMaximum - max) is 0 and never a NaN
constexpr uint32_t kMaxTile = kLanes;   // logits of a tile

class SoftmaxState {
 public:
  __aicore__ inline void Init(TPipe& pipe, GM_ADDR stats, uint32_t positions) {
    stats_.SetGlobalBuffer((__gm__ float*)stats, static_cast<uint64_t>(positions) * 3);
    positions_ = positions;
    pipe.InitBuffer(states_, 2, 3 * kBlock * sizeof(float));
    pipe.InitBuffer(work_, kWork * sizeof(float));
    scratch_ = work_.Get<float>();
    Duplicate(scratch_, 0.0f, static_cast<int32_t>(kWork));
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void Open() {
    state_ = states_.AllocTensor<float>();
    Duplicate(state_, kNoMaximum, static_cast<int32_t>(kBlock));
    Duplicate(state_[kBlock], 0.0f, static_cast<int32_t>(2 * kBlock));
    PipeBarrier<PIPE_V>();
  }

  // Takes in z [count]. Afterwards Shares() is exp(z - max), and Fade() is the factor of everything taken in before.
  __aicore__ inline void Add(const LocalTensor<float>& z, uint32_t count) {
    const LocalTensor<float> top = scratch_[kTop], tops = scratch_[kTops], peak = scratch_[kPeak], fade = Fade(),
                             shares = Shares(), sum = scratch_[kSum];
    const int32_t lanes = static_cast<int32_t>(count), block = static_cast<int32_t>(kBlock);
    WholeReduceMax(top, z, lanes, 1, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
    PipeBarrier<PIPE_V>();
    Brcb(tops, top, 1, {1, 8});
    PipeBarrier<PIPE_V>();
    Max(peak, tops, state_, block);
    PipeBarrier<PIPE_V>();
    Sub(fade, state_, peak, block);
    Sub(shares, z, peak, count, 1, {1, 1, 0, 8, 8, 0});
    PipeBarrier<PIPE_V>();
    Exp(fade, fade, block);
    Exp(shares, shares, lanes);
    Adds(state_, peak, 0.0f, block);
    PipeBarrier<PIPE_V>();
    WholeReduceSum(sum, shares, lanes, 1, 1, 1, 8);
    Mul(state_[kBlock], state_[kBlock], fade, block);
    PipeBarrier<PIPE_V>();
    AscendC::Add(state_[kBlock], state_[kBlock], sum, 1);
    PipeBarrier<PIPE_V>();
  }

  // Adds y z of z [count] to their sum; before z is taken in, because Shares() is written over.
  __aicore__ inline void Aim(const LocalTensor<float>& z, const LocalTensor<float>& targets, uint32_t count) {
    const LocalTensor<float> products = Shares(), sum = scratch_[kSum];
    const int32_t lanes = static_cast<int32_t>(count);
    Mul(products, z, targets, lanes);
    PipeBarrier<PIPE_V>();
    WholeReduceSum(sum, products, lanes, 1, 1, 1, 8);
    PipeBarrier<PIPE_V>();
    AscendC::Add(state_[2 * kBlock], state_[2 * kBlock], sum, 1);
    PipeBarrier<PIPE_V>();
  }

  // The gold logit is z[slot].
  __aicore__ inline void Gold(const LocalTensor<float>& z, uint32_t slot) {
    const LocalTensor<uint32_t> none = scratch_[kZeros].ReinterpretCast<uint32_t>();
    Gather(state_[2 * kBlock], z, none, slot * static_cast<uint32_t>(sizeof(float)), kBlock);
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void Close(uint32_t position) {
    states_.EnQue(state_);
    state_ = states_.DeQue<float>();
    const uint32_t gap = (positions_ - 1) * static_cast<uint32_t>(sizeof(float));
    DataCopyPad(stats_[position], state_, DataCopyExtParams{3, sizeof(float), 0, gap, 0});
    states_.FreeTensor(state_);
  }

  __aicore__ inline LocalTensor<float> Shares() { return scratch_[kShares]; }
  __aicore__ inline LocalTensor<float> Fade() { return scratch_[kFade]; }

 private:
  static constexpr uint32_t kTop = 0, kSum = 8, kPeak = 16, kFade = 24, kZeros = 32, kTops = 64, kShares = 128,
                            kWork = kShares + kMaxTile;

  GlobalTensor<float> stats_;
  TQue<TPosition::VECOUT, 1> states_;
  TBuf<TPosition::VECCALC> work_;
  LocalTensor<float> scratch_, state_;
  uint32_t positions_;
};

}  // namespace megatron_replay::ascend
