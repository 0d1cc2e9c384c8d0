// The restricted loss. The forward pass goes by position. Each candidate's weight row is read once, for its logit and
// for the mixture that becomes the gradient of the hidden state (a softmax over the set in one pass, as in flash
// attention); with targets it is read for their mixture as well. The weight's gradient goes by vocabulary row, from
// entries that lie by column. So each row is written once, by one thread, in the order of the positions, and no result
// depends on the number of threads.
#include "restricted.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/index_add.h>

#include <cmath>
#include <cstring>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "lanes.h"
#include "lists.h"
#include "ragged.h"

namespace megatron_replay {
namespace {

constexpr int64_t kPositions = 4, kColumns = 64;  // one thread takes these at a time

struct Forward {
  const void* hidden;
  const void* weight;
  int64_t hidden_stride, weight_stride, width, positions, entries;
  const int64_t* offsets;
  const int32_t* columns;
  const int64_t* gold;
  const void* targets;   // [m], or null
  void* z;               // [m]
  void* stats;           // [3, N]
  void* mixture;         // [N, H], or null
  void* target_mixture;  // [N, H], or null
};

// The statistics of a position over its candidates so far.
template <class A>
struct Softmax {
  A top = A(kEmpty);
  double total = 0;
  bool started = false;
};

template <class A, int kBytes, int R, class T>
ALWAYS_INLINE void take_rows(const Forward& f, const A* h, int64_t at, A* mixture, A* target_mixture,
                             Softmax<A>& so_far) {
  const T* rows[R];
  const T* next[R];
  for (int r = 0; r < R; ++r) {
    const int64_t after = std::min(at + R + r, f.entries - 1);
    rows[r] = static_cast<const T*>(f.weight) + f.columns[at + r] * f.weight_stride;
    next[r] = static_cast<const T*>(f.weight) + f.columns[after] * f.weight_stride;
  }
  A* z = static_cast<A*>(f.z) + at;
  dots<A, kBytes, R>(h, rows, next, f.width, z);
  A top = so_far.top;
  for (int r = 0; r < R; ++r) top = z[r] > top ? z[r] : top;
  if (top > so_far.top && so_far.started) {
    const A shrink = std::exp(so_far.top - top);
    so_far.total *= static_cast<double>(shrink);
    if (mixture) {
      for (int64_t k = 0; k < f.width; ++k) mixture[k] *= shrink;
    }
  }
  A share[R];
  for (int r = 0; r < R; ++r) {
    share[r] = std::exp(z[r] - top);
    so_far.total += static_cast<double>(share[r]);
  }
  const T* const* nothing = nullptr;
  if (target_mixture) {
    const A* targets = static_cast<const A*>(f.targets) + at;
    combine_both<A, kBytes, R>(mixture, target_mixture, so_far.started, rows, share, targets, f.width);
  } else if (mixture) {
    combine<A, kBytes, R>(mixture, static_cast<const A*>(nullptr), so_far.started ? mixture : nullptr, rows, share,
                          nothing, f.width);
  }
  so_far.top = top;
  so_far.started = true;
}

template <int kBytes, class A, class T>
ALWAYS_INLINE void forward_body(const Forward& f, int64_t first, int64_t last, A* h) {
  for (int64_t t = first; t < last; ++t) {
    const T* hidden = static_cast<const T*>(f.hidden) + t * f.hidden_stride;
    for (int64_t k = 0; k < f.width; ++k) h[k] = load_one<A>(hidden + k);
    A* mixture = f.mixture ? static_cast<A*>(f.mixture) + t * f.width : nullptr;
    A* target_mixture = f.target_mixture ? static_cast<A*>(f.target_mixture) + t * f.width : nullptr;
    Softmax<A> so_far;
    int64_t at = f.offsets[t];
    const int64_t begin = at, end = f.offsets[t + 1];
    for (; at + 8 <= end; at += 8) take_rows<A, kBytes, 8, T>(f, h, at, mixture, target_mixture, so_far);
    for (; at + 4 <= end; at += 4) take_rows<A, kBytes, 4, T>(f, h, at, mixture, target_mixture, so_far);
    for (; at < end; ++at) take_rows<A, kBytes, 1, T>(f, h, at, mixture, target_mixture, so_far);
    if (mixture && !so_far.started) std::memset(mixture, 0, f.width * sizeof(A));
    if (target_mixture && !so_far.started) std::memset(target_mixture, 0, f.width * sizeof(A));
    A* stats = static_cast<A*>(f.stats) + t;
    stats[0] = so_far.top;
    stats[f.positions] = static_cast<A>(so_far.total);
    stats[2 * f.positions] =
        aimed(static_cast<const A*>(f.z), static_cast<const A*>(f.targets), begin, end, f.gold[t]);
  }
}

PER_WIDTH(forward, (class A, class T), (A, T), (const Forward& f, int64_t first, int64_t last, A* h),
          (f, first, last, h));

struct Gradient {
  const void* hidden;
  int64_t hidden_stride, width, num, entries;
  const int32_t* touched;
  const int32_t* begins;
  const int32_t* tokens;
  const void* factors;
  void* out;           // row touched[u] of it, or row u when `compact`
  int64_t out_stride;
  bool compact, low;   // the rows are stored, not added to; they are bfloat16
};

template <class A, int kBytes, int R, class T>
ALWAYS_INLINE void add_rows(const Gradient& g, int64_t at, A* to, const A* add, const A* from) {
  const T* rows[R];
  const T* next[R];
  for (int r = 0; r < R; ++r) {
    const int64_t after = std::min(at + R + r, g.entries - 1);
    rows[r] = static_cast<const T*>(g.hidden) + g.tokens[at + r] * g.hidden_stride;
    next[r] = static_cast<const T*>(g.hidden) + g.tokens[after] * g.hidden_stride;
  }
  combine<A, kBytes, R>(to, add, from, rows, static_cast<const A*>(g.factors) + at, next, g.width);
}

// A row of a bfloat16 gradient: widened, added to, rounded.
ALWAYS_INLINE void add_low(uint16_t* out, const float* sum, int64_t width) {
  float wide[64];
  for (int64_t k = 0; k < width; k += 64) {
    const int64_t n = std::min<int64_t>(64, width - k);
    widen(out + k, wide, n);
    for (int64_t i = 0; i < n; ++i) wide[i] += sum[k + i];
    narrow(wide, out + k, n);
  }
}

template <int kBytes, class A, class T>
ALWAYS_INLINE void gradient_body(const Gradient& g, int64_t first, int64_t last, A* sum) {
  for (int64_t u = first; u < last; ++u) {
    const int64_t row = (g.compact ? u : g.touched[u]) * g.out_stride;
    A* out = static_cast<A*>(g.out) + row;
    int64_t at = g.begins[u];
    const int64_t end = g.begins[u + 1];
    const A* from = nullptr;
    for (; at + 8 < end; at += 8) {
      add_rows<A, kBytes, 8, T>(g, at, sum, static_cast<const A*>(nullptr), from);
      from = sum;
    }
    const A* add = g.compact ? nullptr : out;
    A* to = out;
    if (g.low) {
      add = nullptr;
      to = sum;
    }
    switch (end - at) {
      case 1: add_rows<A, kBytes, 1, T>(g, at, to, add, from); break;
      case 2: add_rows<A, kBytes, 2, T>(g, at, to, add, from); break;
      case 3: add_rows<A, kBytes, 3, T>(g, at, to, add, from); break;
      case 4: add_rows<A, kBytes, 4, T>(g, at, to, add, from); break;
      case 5: add_rows<A, kBytes, 5, T>(g, at, to, add, from); break;
      case 6: add_rows<A, kBytes, 6, T>(g, at, to, add, from); break;
      case 7: add_rows<A, kBytes, 7, T>(g, at, to, add, from); break;
      default: add_rows<A, kBytes, 8, T>(g, at, to, add, from);
    }
    if constexpr (std::is_same_v<A, float>) {
      if (g.low) add_low(static_cast<uint16_t*>(g.out) + row, sum, g.width);
    }
  }
}

PER_WIDTH(gradient, (class A, class T), (A, T), (const Gradient& g, int64_t first, int64_t last, A* sum),
          (g, first, last, sum));

template <class A, class T>
void run_forward(const Forward& f) {
  const int level = static_cast<int>(isa());
  for_each_share(f.positions, kPositions, [&](int64_t first, int64_t last) {
    std::vector<A> h(f.width);
    forward<A, T>[level](f, first, last, h.data());
  });
}

template <class A, class T>
void run_gradient(const Gradient& g) {
  const int level = static_cast<int>(isa());
  for_each_share(g.num, kColumns, [&](int64_t first, int64_t last) {
    std::vector<A> sum(g.width);
    gradient<A, T>[level](g, first, last, sum.data());
  });
}

// The entries by column: touched [U] ascending, begins [U + 1] and tokens [m], int32 and within their
// bounds; and a coefficient of each.
void check_gradient(const at::Tensor& hidden, const at::Tensor& touched, const at::Tensor& begins,
                    const at::Tensor& tokens, const at::Tensor& coefficient, int64_t vocab, const char* op) {
  check_matrix(hidden, op, "hidden");
  const std::pair<const char*, const at::Tensor*> tables[] = {
      {"touched", &touched}, {"begins", &begins}, {"tokens", &tokens}};
  for (const auto& [name, table] : tables) {
    TORCH_CHECK(table->dim() == 1 && table->scalar_type() == at::kInt && table->is_contiguous(), op, ": ", name,
                " must be contiguous int32");
  }
  const int64_t num = touched.size(0), entries = tokens.size(0);
  TORCH_CHECK(begins.size(0) == num + 1, op, ": begins must be [", num + 1, "], one more than the touched rows, got [",
              begins.size(0), "]");
  const int32_t* b = begins.const_data_ptr<int32_t>();
  const int32_t* v = touched.const_data_ptr<int32_t>();
  bool rises = b[0] == 0 && b[num] == entries, ascends = num == 0 || (v[0] >= 0 && v[num - 1] < vocab);
  for (int64_t u = 0; u < num; ++u) rises &= b[u] < b[u + 1];
  for (int64_t u = 1; u < num; ++u) ascends &= v[u - 1] < v[u];
  TORCH_CHECK(rises, op, ": begins must rise from 0 to the ", entries, " entries");
  TORCH_CHECK(ascends, op, ": the touched rows must ascend within the ", vocab, " rows of the weight");
  const int32_t* t = tokens.const_data_ptr<int32_t>();
  uint32_t most = 0;  // a negative position is a huge one
  for (int64_t i = 0; i < entries; ++i) most = std::max(most, static_cast<uint32_t>(t[i]));
  TORCH_CHECK(entries == 0 || most < static_cast<uint64_t>(hidden.size(0)), op,
              ": an entry's position lies outside the ", hidden.size(0), " hidden states");
  TORCH_CHECK(coefficient.scalar_type() == accumulator(hidden.scalar_type()) && coefficient.sizes() == tokens.sizes(),
              op, ": coefficient must be [", entries, "] ", accumulator(hidden.scalar_type()));
}

// `out` has only the touched rows where `compact`, or all rows of the weight.
void add_gradient(const at::Tensor& hidden, const at::Tensor& touched, const at::Tensor& begins,
                  const at::Tensor& tokens, const at::Tensor& coefficient, const at::Tensor& out, bool compact) {
  const at::Tensor h = with_rows(hidden), factors = coefficient.contiguous();
  const Gradient g = {h.const_data_ptr(),
                      h.stride(0),
                      h.size(1),
                      touched.size(0),
                      tokens.size(0),
                      touched.const_data_ptr<int32_t>(),
                      begins.const_data_ptr<int32_t>(),
                      tokens.const_data_ptr<int32_t>(),
                      factors.const_data_ptr(),
                      out.mutable_data_ptr(),
                      out.stride(0),
                      compact,
                      out.scalar_type() == at::kBFloat16};
  for_type(hidden.scalar_type(), [&](auto a, auto t) { run_gradient<decltype(a), decltype(t)>(g); });
}

// Ask for huge pages for a large tensor that was never written: handing out small ones
// takes longer than writing the rows.
void use_huge_pages(const at::Tensor& fresh) {
#ifdef __linux__
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = (begin + fresh.nbytes()) / kHuge * kHuge;
  // may be refused, and need not be granted
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)fresh;
#endif
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> restricted_fwd(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& offsets, const at::Tensor& columns,
    const at::Tensor& gold, bool mix, const std::optional<at::Tensor>& targets) {
  const char* op = "restricted_fwd";
  check_matrix(hidden, op, "hidden");
  check_matrix(weight, op, "weight");
  TORCH_CHECK(hidden.scalar_type() == weight.scalar_type() && hidden.size(1) == weight.size(1), op, ": hidden is ",
              hidden.sizes(), " ", hidden.scalar_type(), ", weight ", weight.sizes(), " ", weight.scalar_type());
  check_table(offsets, columns, weight.size(0), op);
  const int64_t n = hidden.size(0), width = hidden.size(1), m = columns.size(0);
  TORCH_CHECK(offsets.size(0) == n + 1, op, ": ", offsets.size(0) - 1, " sets for ", n, " hidden states");
  check_gold_of(offsets, gold, op);
  const auto kind = accumulator(hidden.scalar_type());
  check_targets(targets, m, kind, op);
  const at::Tensor h = with_rows(hidden), w = with_rows(weight);
  const auto options = hidden.options().dtype(kind);
  const bool mix_targets = mix && targets;
  at::Tensor z = at::empty({m}, options), stats = at::empty({3, n}, options),
             mixture = at::empty({mix ? n : 0, width}, options),
             target_mixture = at::empty({mix_targets ? n : 0, width}, options);
  const Forward f = {h.const_data_ptr(),
                     w.const_data_ptr(),
                     h.stride(0),
                     w.stride(0),
                     width,
                     n,
                     m,
                     offsets.const_data_ptr<int64_t>(),
                     columns.const_data_ptr<int32_t>(),
                     gold.const_data_ptr<int64_t>(),
                     targets ? targets->const_data_ptr() : nullptr,
                     z.mutable_data_ptr(),
                     stats.mutable_data_ptr(),
                     mix ? mixture.mutable_data_ptr() : nullptr,
                     mix_targets ? target_mixture.mutable_data_ptr() : nullptr};
  for_type(hidden.scalar_type(), [&](auto a, auto t) { run_forward<decltype(a), decltype(t)>(f); });
  return {z, stats, mixture, target_mixture};
}

void restricted_bwd_dh(at::Tensor mixture, const at::Tensor& weight, const at::Tensor& columns, const at::Tensor& gold,
                       const at::Tensor& scale, const std::optional<at::Tensor>& target_mixture) {
  const char* op = "restricted_bwd_dh";
  check_matrix(weight, op, "weight");
  const auto kind = accumulator(weight.scalar_type());
  const int64_t n = mixture.size(0), width = weight.size(1);
  TORCH_CHECK(
      mixture.dim() == 2 && mixture.is_contiguous() && mixture.scalar_type() == kind && mixture.size(1) == width, op,
      ": mixture must be contiguous [N, ", width, "] ", kind);
  TORCH_CHECK(scale.scalar_type() == kind && scale.is_contiguous() && scale.dim() == 2 && scale.size(0) == 2 &&
                  scale.size(1) == n,
              op, ": scale must be contiguous [2, ", n, "] ", kind);
  TORCH_CHECK(!target_mixture || (target_mixture->sizes() == mixture.sizes() && target_mixture->scalar_type() == kind &&
                                  target_mixture->is_contiguous()),
              op, ": target_mixture must be contiguous [", n, ", ", width, "] ", kind);
  check_gold(gold, n, columns.size(0), op);
  TORCH_CHECK(columns.scalar_type() == at::kInt && columns.is_contiguous(), op, ": columns must be contiguous int32");
  const at::Tensor w = with_rows(weight);
  const int32_t* c = columns.const_data_ptr<int32_t>();
  const int64_t* g = gold.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < n; ++t) {
    TORCH_CHECK(g[t] < 0 || (c[g[t]] >= 0 && c[g[t]] < w.size(0)), op, ": a column lies outside the ", w.size(0),
                " rows of the weight");
  }
  for_type(weight.scalar_type(), [&](auto a, auto t) {
    using A = decltype(a);
    using T = decltype(t);
    A* rows = mixture.mutable_data_ptr<A>();
    const A* factors = scale.const_data_ptr<A>();
    const A* mixed = target_mixture ? target_mixture->const_data_ptr<A>() : nullptr;
    for_each_share(n, 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        A* row = rows + i * width;
        const A keep = factors[i], drop = factors[n + i];
        if (mixed) {
          const A* target = mixed + i * width;
          for (int64_t k = 0; k < width; ++k) row[k] = row[k] * keep - target[k] * drop;
        } else if (g[i] < 0) {
          for (int64_t k = 0; k < width; ++k) row[k] *= keep;
        } else {
          const T* target = static_cast<const T*>(w.const_data_ptr()) + c[g[i]] * w.stride(0);
          for (int64_t k = 0; k < width; ++k) row[k] = row[k] * keep - load_one<A>(target + k) * drop;
        }
      }
    });
  });
}

void restricted_bwd_dw(const at::Tensor& hidden, const at::Tensor& touched, const at::Tensor& begins,
                       const at::Tensor& tokens, const at::Tensor& coefficient, at::Tensor grad_weight) {
  const char* op = "restricted_bwd_dw";
  check_matrix(grad_weight, op, "grad_weight");
  check_gradient(hidden, touched, begins, tokens, coefficient, grad_weight.size(0), op);
  TORCH_CHECK(grad_weight.size(1) == hidden.size(1), op, ": grad_weight is ", grad_weight.sizes(), ", hidden ",
              hidden.sizes());
  const auto kind = accumulator(hidden.scalar_type()), kept = grad_weight.scalar_type();
  if (grad_weight.stride(1) == 1 && (kept == kind || (kept == at::kBFloat16 && kind == at::kFloat))) {
    add_gradient(hidden, touched, begins, tokens, coefficient, grad_weight, false);
  } else {
    grad_weight.index_add_(0, touched, restricted_bwd_rows(hidden, touched, begins, tokens, coefficient).to(kept));
  }
}

at::Tensor restricted_bwd_rows(const at::Tensor& hidden, const at::Tensor& touched, const at::Tensor& begins,
                               const at::Tensor& tokens, const at::Tensor& coefficient) {
  check_gradient(hidden, touched, begins, tokens, coefficient, INT32_MAX, "restricted_bwd_rows");
  const at::Tensor rows = at::empty({touched.size(0), hidden.size(1)}, coefficient.options());
  use_huge_pages(rows);
  add_gradient(hidden, touched, begins, tokens, coefficient, rows, true);
  return rows;
}

}  // namespace megatron_replay
