// The restricted loss from given logits: their candidates are gathered, and in the backward pass scattered, one element
// each. That waits for memory, not for arithmetic, so nothing here is compiled for an instruction set of its own. All
// give the same bits.
#include <ATen/ops/empty.h>

#include <cmath>

#include "lanes.h"
#include "lists.h"
#include "ragged.h"
#include "restricted.h"

namespace megatron_replay {
namespace {

constexpr int64_t kPositions = 32;  // one thread takes these at a time

struct Sets {
  const int64_t* offsets;
  const int32_t* columns;
  const int64_t* gold;
  const void* targets;  // [m], or null
  int64_t positions;
};

// The sets of logits [N, vocab], checked; the gold entry of a position is one of its own.
Sets checked_sets(const at::Tensor& offsets, const at::Tensor& columns, const at::Tensor& gold,
                  const std::optional<at::Tensor>& targets, const at::Tensor& logits, const char* op) {
  const int64_t positions = logits.size(0), vocab = logits.size(1);
  check_table(offsets, columns, vocab, op, "columns of the logits");
  TORCH_CHECK(offsets.size(0) == positions + 1, op, ": ", offsets.size(0) - 1, " sets for ", positions,
              " rows of logits");
  check_gold_of(offsets, gold, op);
  check_targets(targets, columns.size(0), accumulator(logits.scalar_type()), op);
  return {offsets.const_data_ptr<int64_t>(), columns.const_data_ptr<int32_t>(), gold.const_data_ptr<int64_t>(),
          targets ? targets->const_data_ptr() : nullptr, positions};
}

template <class A, class T>
ALWAYS_INLINE void store_one(T* x, A value) {
  if constexpr (std::is_same_v<A, T>) {
    *x = value;
  } else {
    narrow(&value, x, 1);
  }
}

template <class A>
void write_stats(const Sets& s, int64_t t, const A* z, A* stats) {
  const int64_t begin = s.offsets[t], end = s.offsets[t + 1];
  A top = A(kEmpty);
  for (int64_t i = begin; i < end; ++i) top = z[i] > top ? z[i] : top;
  double total = 0;
  for (int64_t i = begin; i < end; ++i) total += static_cast<double>(std::exp(z[i] - top));
  stats[t] = top;
  stats[s.positions + t] = static_cast<A>(total);
  stats[2 * s.positions + t] = aimed(z, static_cast<const A*>(s.targets), begin, end, s.gold[t]);
}

template <class A, class T>
void gather(const Sets& s, const at::Tensor& logits, A* z, A* stats) {
  const T* x = static_cast<const T*>(logits.const_data_ptr());
  const int64_t row = logits.stride(0), column = logits.stride(1);
  for_each_share(s.positions, kPositions, [&](int64_t first, int64_t last) {
    // all of these positions before the first maximum, so that its cache misses overlap
    for (int64_t t = first; t < last; ++t) {
      for (int64_t i = s.offsets[t]; i < s.offsets[t + 1]; ++i) z[i] = load_one<A>(x + t * row + s.columns[i] * column);
    }
    for (int64_t t = first; t < last; ++t) write_stats(s, t, z, stats);
  });
}

template <class A, class T>
void scatter(const Sets& s, const A* z, const A* scalars, const at::Tensor& grad_logits) {
  T* out = static_cast<T*>(grad_logits.mutable_data_ptr());
  const A* targets = static_cast<const A*>(s.targets);
  const int64_t row = grad_logits.stride(0), column = grad_logits.stride(1);
  for_each_share(s.positions, kPositions, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const A peak = scalars[t], factor = scalars[s.positions + t], grad = scalars[2 * s.positions + t];
      for (int64_t i = s.offsets[t]; i < s.offsets[t + 1]; ++i) {
        const A share = std::exp(z[i] - peak) * factor;
        const A value = targets ? share - targets[i] * grad : i == s.gold[t] ? share - grad : share;
        store_one(out + t * row + s.columns[i] * column, value);
      }
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> restricted_logits_fwd(const at::Tensor& logits, const at::Tensor& offsets,
                                                         const at::Tensor& columns, const at::Tensor& gold,
                                                         const std::optional<at::Tensor>& targets) {
  const char* op = "restricted_logits_fwd";
  check_matrix(logits, op, "logits");
  const Sets sets = checked_sets(offsets, columns, gold, targets, logits, op);
  const auto options = logits.options().dtype(accumulator(logits.scalar_type()));
  at::Tensor z = at::empty({columns.size(0)}, options), stats = at::empty({3, logits.size(0)}, options);
  for_type(logits.scalar_type(), [&](auto a, auto t) {
    using A = decltype(a);
    gather<A, decltype(t)>(sets, logits, z.mutable_data_ptr<A>(), stats.mutable_data_ptr<A>());
  });
  return {z, stats};
}

void restricted_logits_bwd(const at::Tensor& z, const at::Tensor& offsets, const at::Tensor& columns,
                           const at::Tensor& gold, const at::Tensor& scalars, at::Tensor grad_logits,
                           const std::optional<at::Tensor>& targets) {
  const char* op = "restricted_logits_bwd";
  check_matrix(grad_logits, op, "grad_logits");
  const auto kind = accumulator(grad_logits.scalar_type());
  const int64_t n = grad_logits.size(0);
  const Sets sets = checked_sets(offsets, columns, gold, targets, grad_logits, op);
  TORCH_CHECK(z.scalar_type() == kind && z.is_contiguous() && z.sizes() == columns.sizes(), op,
              ": z must be contiguous [", columns.size(0), "] ", kind);
  TORCH_CHECK(scalars.scalar_type() == kind && scalars.is_contiguous() && scalars.dim() == 2 && scalars.size(0) == 3 &&
                  scalars.size(1) == n,
              op, ": scalars must be contiguous [3, ", n, "] ", kind);
  for_type(grad_logits.scalar_type(), [&](auto a, auto t) {
    using A = decltype(a);
    scatter<A, decltype(t)>(sets, z.const_data_ptr<A>(), scalars.const_data_ptr<A>(), grad_logits);
  });
}

}  // namespace megatron_replay
