// The gradient of hidden from the mixtures that restricted_fwd left: each row scaled, less that of the targets. Without
// targets that is the gold row of the weight.
#pragma once

#include "rows.h"
#include "tables.h"

namespace megatron_replay::ascend {

constexpr uint32_t kSlice = 4096;  // columns at a time

template <typename T>
class RestrictedBwdDh {
 public:
  __aicore__ inline void Init(GM_ADDR mixture, GM_ADDR weight, GM_ADDR columns, GM_ADDR gold, GM_ADDR scale,
                              GM_ADDR target_mixture, uint32_t positions, uint32_t width, uint32_t candidates,
                              uint32_t vocab, uint32_t soft) {
    width_ = width;
    soft_ = soft;
    slice_ = Least(width, kSlice);
    range_ = ShareOfBlock(positions);
    mixture_.SetGlobalBuffer((__gm__ float*)mixture, static_cast<uint64_t>(positions) * width);
    weight_.SetGlobalBuffer((__gm__ T*)weight, static_cast<uint64_t>(vocab) * width);
    columns_.SetGlobalBuffer((__gm__ int32_t*)columns, candidates);
    gold_table_.Init(pipe_, gold, positions);
    keep_table_.Init(pipe_, scale, positions);
    drop_table_.Init(pipe_, scale + static_cast<uint64_t>(positions) * sizeof(float), positions);
    gold_table_.Clip(range_.last);
    keep_table_.Clip(range_.last);
    drop_table_.Clip(range_.last);
    pipe_.InitBuffer(mixture_in_, 2, slice_ * sizeof(float));
    pipe_.InitBuffer(row_in_, 2, slice_ * sizeof(T));
    pipe_.InitBuffer(row_wide_, slice_ * sizeof(float));
    pipe_.InitBuffer(mixture_out_, 2, slice_ * sizeof(float));
    if (!soft) return;
    target_mixture_.SetGlobalBuffer((__gm__ float*)target_mixture, static_cast<uint64_t>(positions) * width);
    pipe_.InitBuffer(target_in_, 2, slice_ * sizeof(float));
  }

  __aicore__ inline void Process() {
    if (range_.first == range_.last) return;
    Step step = First(range_.first);
    Load(step);
    while (true) {
      Step next = step;
      const bool more = Advance(next);
      if (more) Load(next);
      Compute(step);
      if (!more) return;
      step = next;
    }
  }

 private:
  struct Step {
    uint32_t token, start, count;
    int64_t gold;
    float keep, drop;
  };

  __aicore__ inline Step First(uint32_t token) {
    return {token, 0, slice_, soft_ ? -1 : gold_table_.At(token), keep_table_.At(token), drop_table_.At(token)};
  }

  __aicore__ inline bool Advance(Step& step) {
    if (step.start + step.count < width_) {
      step.start += step.count;
      step.count = Least(slice_, width_ - step.start);
      return true;
    }
    if (step.token + 1 == range_.last) return false;
    step = First(step.token + 1);
    return true;
  }

  __aicore__ inline void Load(const Step& step) {
    const LocalTensor<float> mixture = mixture_in_.template AllocTensor<float>();
    DataCopy(mixture, mixture_[static_cast<uint64_t>(step.token) * width_ + step.start], step.count);
    mixture_in_.EnQue(mixture);
    if (soft_) LoadTarget(step);
    if (step.gold < 0) return;
    const LocalTensor<T> row = row_in_.template AllocTensor<T>();
    const uint64_t column = static_cast<uint64_t>(columns_.GetValue(static_cast<uint64_t>(step.gold)));
    DataCopy(row, weight_[column * width_ + step.start], step.count);
    row_in_.EnQue(row);
  }

  __aicore__ inline void LoadTarget(const Step& step) {
    const LocalTensor<float> target = target_in_.template AllocTensor<float>();
    DataCopy(target, target_mixture_[static_cast<uint64_t>(step.token) * width_ + step.start], step.count);
    target_in_.EnQue(target);
  }

  __aicore__ inline void Compute(const Step& step) {
    const int32_t count = static_cast<int32_t>(step.count);
    LocalTensor<float> mixture = mixture_in_.template DeQue<float>();
    LocalTensor<float> out = mixture_out_.template AllocTensor<float>();
    Muls(out, mixture, step.keep, count);
    if (step.gold >= 0) {
      LocalTensor<T> row = row_in_.template DeQue<T>();
      const LocalTensor<float> wide = row_wide_.Get<float>();
      Widen(wide, row, step.count);
      PipeBarrier<PIPE_V>();
      row_in_.FreeTensor(row);
      Axpy(out, wide, -step.drop, count);
      PipeBarrier<PIPE_V>();
    }
    if (soft_) {
      LocalTensor<float> target = target_in_.template DeQue<float>();
      PipeBarrier<PIPE_V>();
      Axpy(out, target, -step.drop, count);
      PipeBarrier<PIPE_V>();
      target_in_.FreeTensor(target);
    }
    mixture_in_.FreeTensor(mixture);
    mixture_out_.EnQue(out);
    out = mixture_out_.template DeQue<float>();
    DataCopy(mixture_[static_cast<uint64_t>(step.token) * width_ + step.start], out, step.count);
    mixture_out_.FreeTensor(out);
  }

  TPipe pipe_;
  Window<int64_t> gold_table_;
  Window<float> keep_table_, drop_table_;
  GlobalTensor<float> mixture_, target_mixture_;
  GlobalTensor<T> weight_;
  GlobalTensor<int32_t> columns_;
  TQue<TPosition::VECIN, 2> mixture_in_, row_in_, target_in_;
  TQue<TPosition::VECOUT, 1> mixture_out_;
  TBuf<TPosition::VECCALC> row_wide_;
  Range range_;
  uint32_t width_, slice_, soft_;
};

template <typename T>
__aicore__ inline void restricted_bwd_dh(GM_ADDR mixture, GM_ADDR weight, GM_ADDR columns, GM_ADDR gold, GM_ADDR scale,
                                         GM_ADDR target_mixture, uint32_t positions, uint32_t width,
                                         uint32_t candidates, uint32_t vocab, uint32_t soft) {
  RestrictedBwdDh<T> kernel;
  kernel.Init(mixture, weight, columns, gold, scale, target_mixture, positions, width, candidates, vocab, soft);
  kernel.Process();
}

}  // namespace megatron_replay::ascend
