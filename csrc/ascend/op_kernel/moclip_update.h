// The second pass of MoClip, and the whole of Adam-atan2 and AdamW: moments, direction, decay, step and the rounded
// copy, everything read and written once. The operations and their order are those of csrc/cpu/adam.cpp.
#pragma once

#include "chunks.h"

namespace megatron_replay::ascend {

constexpr uint32_t kUpdateTile = 2048;

struct UpdateScalars {
  float m_keep, m_grad, v_grad, v_momentum, beta2, first, second, eps, keep, rate;
  uint32_t arctangent;
};

template <typename P, typename G>
class MoclipUpdate {
 public:
  __aicore__ inline void Init(GM_ADDR param, GM_ADDR grad, GM_ADDR exp_avg, GM_ADDR exp_avg_sq, GM_ADDR rounded,
                              GM_ADDR partial, uint64_t length, uint32_t round, const UpdateScalars& scalars) {
    s_ = scalars;
    round_ = round;
    tiles_.Init(length, kUpdateTile);
    param_.SetGlobalBuffer((__gm__ P*)param, length);
    grad_.SetGlobalBuffer((__gm__ G*)grad, length);
    m_.SetGlobalBuffer((__gm__ float*)exp_avg, length);
    v_.SetGlobalBuffer((__gm__ float*)exp_avg_sq, length);
    rounded_.SetGlobalBuffer((__gm__ bfloat16_t*)rounded, round ? length : 0);
    partial_.SetGlobalBuffer((__gm__ float*)partial, (length + kChunk - 1) / kChunk * kPartials);
    pipe_.InitBuffer(param_in_, 2, kUpdateTile * sizeof(P));
    pipe_.InitBuffer(grad_in_, 2, kUpdateTile * sizeof(G));
    pipe_.InitBuffer(m_in_, 2, kUpdateTile * sizeof(float));
    pipe_.InitBuffer(v_in_, 2, kUpdateTile * sizeof(float));
    pipe_.InitBuffer(param_out_, 2, kUpdateTile * sizeof(P));
    pipe_.InitBuffer(m_out_, 2, kUpdateTile * sizeof(float));
    pipe_.InitBuffer(v_out_, 2, kUpdateTile * sizeof(float));
    if (round) pipe_.InitBuffer(rounded_out_, 1, kUpdateTile * sizeof(bfloat16_t));
    pipe_.InitBuffer(partial_out_, 1, kPartials * sizeof(float));
    pipe_.InitBuffer(work_, kVectors * kUpdateTile * sizeof(float));
    pipe_.InitBuffer(sign_, kUpdateTile * sizeof(float));
    pipe_.InitBuffer(mask_, kUpdateTile / 8);
    pipe_.InitBuffer(folded_, kLanes * sizeof(float));
    pipe_.InitBuffer(sum_, kLanes * sizeof(float));
    // the sign bit of a float32 in the upper of its two 16-bit halves
    Duplicate(sign_.Get<uint32_t>(), 0x80000000u, static_cast<int32_t>(kUpdateTile));
    // lanes behind the last element are computed with too, and count for nothing
    Duplicate(work_.Get<float>(), 0.0f, static_cast<int32_t>(kVectors * kUpdateTile));
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void Process() { OneAhead<FlatTile>(tiles_, *this); }

  __aicore__ inline void Load(const FlatTile& tile) {
    Fetch(grad_in_, grad_, tile);
    Fetch(m_in_, m_, tile);
    Fetch(v_in_, v_, tile);
    Fetch(param_in_, param_, tile);
  }

  __aicore__ inline LocalTensor<float> Vector(uint32_t i) { return work_.Get<float>()[i * kUpdateTile]; }

  __aicore__ inline void Compute(const FlatTile& tile) {
    const int32_t n = static_cast<int32_t>(tile.count);
    const LocalTensor<float> grad = Vector(0), u = Vector(1);
    if (tile.count < kUpdateTile) {
      Duplicate(u, 0.0f, static_cast<int32_t>(kUpdateTile));
      PipeBarrier<PIPE_V>();
    }
    LocalTensor<G> raw = grad_in_.template DeQue<G>();
    Widen(grad, raw, tile.count);
    PipeBarrier<PIPE_V>();
    grad_in_.FreeTensor(raw);
    LocalTensor<float> m = m_in_.template DeQue<float>(), v = v_in_.template DeQue<float>();
    LocalTensor<float> m_new = m_out_.template AllocTensor<float>(), v_new = v_out_.template AllocTensor<float>();
    Moments(grad, m, v, m_new, v_new, n);
    m_in_.FreeTensor(m);
    v_in_.FreeTensor(v);
    Sqrt(Vector(2), v_new, n);
    PipeBarrier<PIPE_V>();
    if (s_.arctangent) {
      Muls(grad, m_new, s_.first, n);
      PipeBarrier<PIPE_V>();
      Arctangent(u, grad, Vector(2), n);
    } else {
      Quotient(u, m_new, Vector(2), n);
    }
    Send(m_out_, m_new, m_, tile);
    Send(v_out_, v_new, v_, tile);
    Step(u, tile);
    AddSquares(u, tile);
  }

 private:
  static constexpr uint32_t kVectors = 6;

  template <typename T, typename Queue>
  __aicore__ inline void Fetch(Queue& queue, const GlobalTensor<T>& source, const FlatTile& tile) {
    const LocalTensor<T> local = queue.template AllocTensor<T>();
    FetchFlat(local, source[tile.first], tile.count);
    queue.EnQue(local);
  }

  template <typename T, typename Queue>
  __aicore__ inline void Send(Queue& queue, LocalTensor<T>& local, const GlobalTensor<T>& target,
                              const FlatTile& tile) {
    queue.EnQue(local);
    local = queue.template DeQue<T>();
    SendFlat(target[tile.first], local, tile.count);
    queue.FreeTensor(local);
  }

  // v <- beta2 v + (v_grad g + v_momentum m)^2 with the m before; m <- m_keep m + m_grad g.
  __aicore__ inline void Moments(const LocalTensor<float>& grad, const LocalTensor<float>& m,
                                 const LocalTensor<float>& v, const LocalTensor<float>& m_new,
                                 const LocalTensor<float>& v_new, int32_t n) {
    const LocalTensor<float> w = Vector(2);
    Muls(w, grad, s_.v_grad, n);
    Muls(m_new, m, s_.m_keep, n);
    Muls(v_new, v, s_.beta2, n);
    PipeBarrier<PIPE_V>();
    Axpy(w, m, s_.v_momentum, n);
    Axpy(m_new, grad, s_.m_grad, n);
    PipeBarrier<PIPE_V>();
    MulAddDst(v_new, w, w, n);
    PipeBarrier<PIPE_V>();
  }

  // u = atan2(y, x) for x >= 0. With t = min(|y|, x) / max(|y|, x) in [0, 1], atan t = t + t z Q(z), z =
  // t^2 (the coefficients are those of csrc/cpu/arctangent.h); where |y| > x the angle is pi / 2 less
  // that, and it has the sign of y.
  __aicore__ inline void Arctangent(const LocalTensor<float>& u, const LocalTensor<float>& y,
                                    const LocalTensor<float>& x, int32_t n) {
    constexpr float kQ[8] = {-0.333331525f,  0.199937731f,  -0.142110556f, 0.106660038f,
                             -0.0755221248f, 0.0432118438f, -0.016367916f, 0.00292068906f};
    const LocalTensor<float> a = Vector(3), t = Vector(4), z = Vector(5);
    const LocalTensor<uint8_t> steep = mask_.Get<uint8_t>();
    Abs(a, y, n);
    PipeBarrier<PIPE_V>();
    Compare(steep, a, x, CMPMODE::GT, kUpdateTile);
    Min(t, a, x, n);
    Max(z, a, x, n);
    PipeBarrier<PIPE_V>();
    Maxs(z, z, kTiny, n);  // 0 / 0 is to be 0
    PipeBarrier<PIPE_V>();
    Div(t, t, z, n);
    PipeBarrier<PIPE_V>();
    Mul(z, t, t, n);
    PipeBarrier<PIPE_V>();
    Muls(u, z, kQ[7], n);
    PipeBarrier<PIPE_V>();
    for (int32_t i = 6; i >= 0; --i) {
      Adds(u, u, kQ[i], n);
      PipeBarrier<PIPE_V>();
      Mul(u, u, z, n);
      PipeBarrier<PIPE_V>();
    }
    Mul(u, u, t, n);
    PipeBarrier<PIPE_V>();
    Add(u, u, t, n);
    PipeBarrier<PIPE_V>();
    Muls(t, u, -1.0f, n);
    PipeBarrier<PIPE_V>();
    Adds(t, t, -kHalfPiLow, n);
    PipeBarrier<PIPE_V>();
    Adds(t, t, kHalfPi, n);
    PipeBarrier<PIPE_V>();
    Select(u, steep, t, u, SELMODE::VSEL_TENSOR_TENSOR_MODE, static_cast<uint32_t>(n));
    const LocalTensor<uint16_t> signs = y.template ReinterpretCast<uint16_t>(),
                                bits = u.template ReinterpretCast<uint16_t>();
    And(signs, signs, sign_.Get<uint16_t>(), 2 * n);
    PipeBarrier<PIPE_V>();
    Or(bits, bits, signs, 2 * n);
    PipeBarrier<PIPE_V>();
  }

  // u = first m / (second sqrt v + eps).
  __aicore__ inline void Quotient(const LocalTensor<float>& u, const LocalTensor<float>& m,
                                  const LocalTensor<float>& root, int32_t n) {
    Muls(root, root, s_.second, n);
    PipeBarrier<PIPE_V>();
    Adds(root, root, s_.eps, n);
    PipeBarrier<PIPE_V>();
    Div(u, m, root, n);
    PipeBarrier<PIPE_V>();
    Muls(u, u, s_.first, n);
    PipeBarrier<PIPE_V>();
  }

  // param <- keep param - rate u, and its rounded copy.
  __aicore__ inline void Step(const LocalTensor<float>& u, const FlatTile& tile) {
    const int32_t n = static_cast<int32_t>(tile.count);
    const LocalTensor<float> wide = Vector(3);
    LocalTensor<P> before = param_in_.template DeQue<P>();
    Widen(wide, before, tile.count);
    PipeBarrier<PIPE_V>();
    param_in_.FreeTensor(before);
    Muls(wide, wide, s_.keep, n);
    PipeBarrier<PIPE_V>();
    Axpy(wide, u, -s_.rate, n);
    PipeBarrier<PIPE_V>();
    LocalTensor<P> after = param_out_.template AllocTensor<P>();
    if constexpr (IsSameType<P, float>::value) {
      Muls(after, wide, 1.0f, n);
    } else {
      Cast(after, wide, RoundMode::CAST_RINT, tile.count);
    }
    if (round_) {
      LocalTensor<bfloat16_t> rounded = rounded_out_.template AllocTensor<bfloat16_t>();
      Cast(rounded, wide, RoundMode::CAST_RINT, tile.count);
      Send(rounded_out_, rounded, rounded_, tile);
    }
    Send(param_out_, after, param_, tile);
  }

  __aicore__ inline void AddSquares(const LocalTensor<float>& u, const FlatTile& tile) {
    const LocalTensor<float> squares = Vector(4), folded = folded_.Get<float>(), sum = sum_.Get<float>();
    const int32_t repeats = static_cast<int32_t>(kUpdateTile / kLanes);
    if (tile.opens) Duplicate(sum, 0.0f, repeats);
    Mul(squares, u, u, static_cast<int32_t>(kUpdateTile));
    PipeBarrier<PIPE_V>();
    WholeReduceSum(folded, squares, static_cast<int32_t>(kLanes), repeats, 1, 1, 8);
    PipeBarrier<PIPE_V>();
    Add(sum, sum, folded, repeats);
    PipeBarrier<PIPE_V>();
    if (!tile.closes) return;
    LocalTensor<float> out = partial_out_.template AllocTensor<float>();
    Duplicate(out, 0.0f, static_cast<int32_t>(kPartials));
    PipeBarrier<PIPE_V>();
    WholeReduceSum(out, sum, repeats, 1, 1, 1, 8);
    PipeBarrier<PIPE_V>();
    partial_out_.EnQue(out);
    out = partial_out_.template DeQue<float>();
    DataCopy(partial_[static_cast<uint64_t>(tile.chunk) * kPartials], out, kPartials);
    partial_out_.FreeTensor(out);
  }

  static constexpr float kTiny = 1.17549435e-38f;
  static constexpr float kHalfPi = 1.57079637f, kHalfPiLow = 4.37113883e-8f;  // pi / 2 is their difference

  TPipe pipe_;
  FlatTiles tiles_;
  UpdateScalars s_;
  GlobalTensor<P> param_;
  GlobalTensor<G> grad_;
  GlobalTensor<float> m_, v_, partial_;
  GlobalTensor<bfloat16_t> rounded_;
  TQue<TPosition::VECIN, 2> param_in_, grad_in_, m_in_, v_in_;
  TQue<TPosition::VECOUT, 1> param_out_, m_out_, v_out_, rounded_out_, partial_out_;
  TBuf<TPosition::VECCALC> work_, sign_, mask_, folded_, sum_;
  uint32_t round_;
};

template <typename P, typename G>
__aicore__ inline void moclip_update(GM_ADDR param, GM_ADDR grad, GM_ADDR exp_avg, GM_ADDR exp_avg_sq, GM_ADDR rounded,
                                     GM_ADDR partial, uint64_t length, uint32_t round, uint32_t arctangent,
                                     float m_keep, float m_grad, float v_grad, float v_momentum, float beta2,
                                     float first, float second, float eps, float keep, float rate) {
  MoclipUpdate<P, G> kernel;
  const UpdateScalars scalars{m_keep, m_grad, v_grad, v_momentum, beta2, first, second, eps, keep, rate, arctangent};
  kernel.Init(param, grad, exp_avg, exp_avg_sq, rounded, partial, length, round, scalars);
  kernel.Process();
}

}  // namespace megatron_replay::ascend
