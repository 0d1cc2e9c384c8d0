// The update pass of AdamW, Adam-atan2 and MoClip: moments, direction, decay, step and the rounded copy, everything
// read and written once. The operations and their order are those of megatron_replay/optim/adam.py, each rounded once,
// so that its moments have the same bits. The directions may differ in the last place: by the arctangent, and because
// torch's square root (MKL's) is not always the nearest number.
#include <array>

#include <ATen/ops/zeros.h>

#include "arctangent.h"
#include "isa.h"
#include "lists.h"
#include "optimizer.h"

namespace megatron_replay {
namespace {

constexpr int64_t kScalars = 11;

struct Step {
  float m_keep, m_grad, v_grad, v_momentum, beta2;  // how the gradient enters the moments
  float first, second, eps;                         // what corrects them in the direction
  float keep, rate;                                 // theta <- keep theta - rate u
  bool arctangent;
};

struct Piece {
  void* param;  // float32, or bfloat16 when `low_param`
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  uint16_t* rounded;  // may be null
  bool low_param, low_grad;
};

template <bool kArctangent>
ALWAYS_INLINE void move(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v,
                        float* __restrict u, const Step s, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float w = g[i] * s.v_grad + m[i] * s.v_momentum;
    const float second = v[i] * s.beta2 + w * w;
    const float mean = m[i] * s.m_keep + g[i] * s.m_grad;
    const float root = __builtin_sqrtf(second);
    const float direction = kArctangent ? arctangent(mean * s.first, root) : mean / (root * s.second + s.eps) * s.first;
    m[i] = mean;
    v[i] = second;
    u[i] = direction;
    p[i] = p[i] * s.keep - direction * s.rate;
  }
}

template <bool kArctangent>
ALWAYS_INLINE void move_piece(const Piece& piece, const Step& step, int64_t begin, int64_t end, double& squares) {
  double sums[kLanes] = {};
  alignas(64) float p_buffer[kChunk];
  alignas(64) float g_buffer[kChunk];
  alignas(64) float u[kChunk];
  for (int64_t start = begin; start < end; start += kChunk) {
    const int64_t n = std::min(kChunk, end - start);
    float* p = p_buffer;
    uint16_t* low = piece.rounded ? piece.rounded + start : nullptr;
    if (piece.low_param) {
      low = static_cast<uint16_t*>(piece.param) + start;
      widen(low, p_buffer, n);
    } else {
      p = static_cast<float*>(piece.param) + start;
    }
    const float* g = g_buffer;
    if (piece.low_grad) {
      widen(static_cast<const uint16_t*>(piece.grad) + start, g_buffer, n);
    } else {
      g = static_cast<const float*>(piece.grad) + start;
    }
    float* m = piece.exp_avg + start;
    float* v = piece.exp_avg_sq + start;
    for (int64_t i = 0; i < n; i += kStride) {
      prefetch(p + i);
      prefetch(g + i);
      prefetch(m + i);
      prefetch(v + i);
      move<kArctangent>(p + i, g + i, m + i, v + i, u + i, step, std::min(kStride, n - i));
    }
    if (low) narrow(p, low, n);
    const int64_t whole = (n + kTurn - 1) / kTurn * kTurn;
    for (int64_t i = n; i < whole; ++i) u[i] = 0.0f;
    add_products(u, u, sums, whole);
  }
  squares = folded(sums);
}

ALWAYS_INLINE void update_body(const Piece& piece, const Step& step, int64_t begin, int64_t end, double& squares) {
  if (step.arctangent) {
    move_piece<true>(piece, step, begin, end, squares);
  } else {
    move_piece<false>(piece, step, begin, end, squares);
  }
}

PER_ISA(update, (const Piece& piece, const Step& step, int64_t begin, int64_t end, double& squares),
        (piece, step, begin, end, squares));

Step step_of(const double* row) {
  std::array<float, kScalars> s;
  for (int64_t i = 0; i < kScalars; ++i) s[i] = static_cast<float>(row[i]);
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], row[10] != 0};
}

float* moment(const at::Tensor& x, int64_t n, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.numel() == n && x.is_contiguous(), "adam_update: ", name,
              " must be contiguous float32 of the parameter's size");
  return x.mutable_data_ptr<float>();
}

Piece piece_of(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg,
               const at::Tensor& exp_avg_sq) {
  const auto known = [](const at::Tensor& x) {
    return x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16;
  };
  TORCH_CHECK(known(param) && known(grad), "adam_update: parameters and gradients are float32 or bfloat16");
  TORCH_CHECK(param.is_contiguous() && grad.is_contiguous() && grad.numel() == param.numel(),
              "adam_update: parameters and gradients must be contiguous and of one size");
  return {param.mutable_data_ptr(),
          grad.const_data_ptr(),
          moment(exp_avg, param.numel(), "exp_avg"),
          moment(exp_avg_sq, param.numel(), "exp_avg_sq"),
          nullptr,
          param.scalar_type() == at::kBFloat16,
          grad.scalar_type() == at::kBFloat16};
}

uint16_t* copy_of(const at::Tensor& param, const at::Tensor& rounded) {
  TORCH_CHECK(param.scalar_type() == at::kFloat && rounded.scalar_type() == at::kBFloat16 && rounded.is_contiguous() &&
                  rounded.numel() == param.numel(),
              "adam_update: rounded copies are contiguous bfloat16, of float32 parameters of the same size");
  return static_cast<uint16_t*>(rounded.mutable_data_ptr());
}

}  // namespace

at::Tensor adam_update(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                       at::TensorList rounded, const at::Tensor& scalars) {
  const size_t num = params.size();
  TORCH_CHECK(grads.size() == num && exp_avgs.size() == num && exp_avg_sqs.size() == num &&
                  (rounded.empty() || rounded.size() == num),
              "adam_update: lists of different lengths");
  TORCH_CHECK(scalars.scalar_type() == at::kDouble && scalars.is_contiguous() && scalars.dim() == 2 &&
                  scalars.size(0) == static_cast<int64_t>(num) && scalars.size(1) == kScalars,
              "adam_update: scalars must be [", num, ", ", kScalars, "] float64");
  std::vector<int64_t> lengths(num);
  std::vector<Piece> pieces(num);
  std::vector<Step> steps(num);
  for (size_t i = 0; i < num; ++i) {
    lengths[i] = params[i].numel();
    pieces[i] = piece_of(params[i], grads[i], exp_avgs[i], exp_avg_sqs[i]);
    if (!rounded.empty()) pieces[i].rounded = copy_of(params[i], rounded[i]);
    steps[i] = step_of(scalars.const_data_ptr<double>() + i * kScalars);
  }
  const std::vector<Block> blocks = blocks_of(lengths);
  std::vector<double> partial(blocks.size());
  const int level = static_cast<int>(isa());
  for_each_block(blocks, [&](int64_t b) {
    const auto [i, begin, end] = blocks[b];
    update[level](pieces[i], steps[i], begin, end, partial[b]);
  });
  at::Tensor out = at::zeros({static_cast<int64_t>(num)}, at::kDouble);
  double* squares = out.mutable_data_ptr<double>();
  for (size_t b = 0; b < blocks.size(); ++b) squares[blocks[b].tensor] += partial[b];
  return out;
}

}  // namespace megatron_replay
