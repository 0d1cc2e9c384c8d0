// The statistics pass: (sum m g, sum m^2, sum g^2) of each tensor in float64, gradient and momentum read once.
#include <ATen/ops/zeros.h>

#include "isa.h"
#include "lists.h"
#include "optimizer.h"

namespace megatron_replay {
namespace {

struct Sums {
  double mg, mm, gg;
};

// Both chunks padded with zeros to a whole number of turns.
template <class T, bool kMomentum>
ALWAYS_INLINE void add_chunk(const T* g, const T* m, double (&sums)[3][kLanes], int64_t n) {
  if (kMomentum) {
    for (int64_t start = 0; start < n; start += kTurn) {
      const T* __restrict a = m + start;
      const T* __restrict b = g + start;
      for (int64_t i = 0; i < kTurn; i += kStride) {
        prefetch(a + i);
        prefetch(b + i);
      }
      double* __restrict mg = sums[0];
      double* __restrict mm = sums[1];
      double* __restrict gg = sums[2];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        double s = mg[lane], t = mm[lane], u = gg[lane];
        for (int64_t i = 0; i < 4; ++i) {
          const double x = static_cast<double>(a[lane + i * kLanes]);
          const double y = static_cast<double>(b[lane + i * kLanes]);
          s += x * y;
          t += x * x;
          u += y * y;
        }
        mg[lane] = s;
        mm[lane] = t;
        gg[lane] = u;
      }
    }
  } else {
    add_products(g, g, sums[2], n);
  }
}

template <class T>
ALWAYS_INLINE const T* padded(const T* x, T* buffer, int64_t n, int64_t whole) {
  if (n == whole) return x;
  for (int64_t i = 0; i < n; ++i) buffer[i] = x[i];
  for (int64_t i = n; i < whole; ++i) buffer[i] = T(0);
  return buffer;
}

template <class T, bool kMomentum>
ALWAYS_INLINE void add_tensor(const void* grad, bool low, const T* m, int64_t n, Sums& out) {
  double sums[3][kLanes] = {};
  alignas(64) T g_buffer[kChunk];
  alignas(64) T m_buffer[kChunk];
  alignas(64) T wide[kChunk];
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t count = std::min(kChunk, n - start);
    const int64_t whole = (count + kTurn - 1) / kTurn * kTurn;
    const T* g = static_cast<const T*>(grad) + start;
    if constexpr (std::is_same_v<T, float>) {
      if (low) {
        widen(static_cast<const uint16_t*>(grad) + start, wide, count);
        g = wide;
      }
    }
    g = padded(g, g_buffer, count, whole);
    add_chunk<T, kMomentum>(g, kMomentum ? padded(m + start, m_buffer, count, whole) : nullptr, sums, whole);
  }
  out = {folded(sums[0]), folded(sums[1]), folded(sums[2])};
}

ALWAYS_INLINE void sums32_body(const void* grad, bool low, const float* m, int64_t n, Sums& out) {
  if (m) {
    add_tensor<float, true>(grad, low, m, n, out);
  } else {
    add_tensor<float, false>(grad, low, m, n, out);
  }
}

ALWAYS_INLINE void sums64_body(const double* grad, const double* m, int64_t n, Sums& out) {
  if (m) {
    add_tensor<double, true>(grad, false, m, n, out);
  } else {
    add_tensor<double, false>(grad, false, m, n, out);
  }
}

PER_ISA(sums32, (const void* grad, bool low, const float* m, int64_t n, Sums& out), (grad, low, m, n, out));
PER_ISA(sums64, (const double* grad, const double* m, int64_t n, Sums& out), (grad, m, n, out));

}  // namespace

at::Tensor optimizer_sums(at::TensorList grads, const c10::List<std::optional<at::Tensor>>& momenta) {
  TORCH_CHECK(grads.size() == momenta.size(), "optimizer_sums: ", grads.size(), " gradients and ", momenta.size(),
              " momenta");
  const size_t num = grads.size();
  std::vector<int64_t> lengths(num);
  std::vector<const void*> g(num), m(num, nullptr);
  for (size_t i = 0; i < num; ++i) {
    const auto dtype = grads[i].scalar_type();
    TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kDouble, "optimizer_sums: gradients of ",
                dtype);
    TORCH_CHECK(grads[i].is_contiguous(), "optimizer_sums: gradient ", i, " is not contiguous");
    lengths[i] = grads[i].numel();
    g[i] = grads[i].const_data_ptr();
    const std::optional<at::Tensor> momentum = momenta.get(i);
    if (momentum.has_value()) {
      const auto wanted = dtype == at::kDouble ? at::kDouble : at::kFloat;
      TORCH_CHECK(momentum->scalar_type() == wanted && momentum->numel() == lengths[i] && momentum->is_contiguous(),
                  "optimizer_sums: momentum ", i, " must be contiguous ", wanted, " of the gradient's size");
      m[i] = momentum->const_data_ptr();
    }
  }
  const std::vector<Block> blocks = blocks_of(lengths);
  std::vector<Sums> partial(blocks.size());
  const int level = static_cast<int>(isa());
  for_each_block(blocks, [&](int64_t b) {
    const auto [i, begin, end] = blocks[b];
    const int64_t n = end - begin;
    if (grads[i].scalar_type() == at::kDouble) {
      const double* momentum = static_cast<const double*>(m[i]);
      sums64[level](static_cast<const double*>(g[i]) + begin, momentum ? momentum + begin : nullptr, n, partial[b]);
    } else {
      const bool low = grads[i].scalar_type() == at::kBFloat16;
      const float* momentum = static_cast<const float*>(m[i]);
      const char* grad = static_cast<const char*>(g[i]) + begin * (low ? 2 : 4);
      sums32[level](grad, low, momentum ? momentum + begin : nullptr, n, partial[b]);
    }
  });
  at::Tensor out = at::zeros({static_cast<int64_t>(num), 3}, at::kDouble);
  double* row = out.mutable_data_ptr<double>();
  for (size_t b = 0; b < blocks.size(); ++b) {
    double* sums = row + 3 * blocks[b].tensor;
    sums[0] += partial[b].mg;
    sums[1] += partial[b].mm;
    sums[2] += partial[b].gg;
  }
  return out;
}

}  // namespace megatron_replay
