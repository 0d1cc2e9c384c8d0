// The common parts of the kernels over ragged tables of candidates: dtypes, checks, and dealing work of uneven size to
// the threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <atomic>
#include <optional>

namespace megatron_replay {

constexpr double kEmpty = -3e38;  // maximum of no candidates, see torch_twins.EMPTY

// Each index once, `grain` at a time by whichever thread is free; only for work whose result
// does not depend on who does it.
template <class Work>
void for_each_share(int64_t count, int64_t grain, const Work& work) {
  const int64_t shares = (count + grain - 1) / grain;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), shares), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < shares; i = next++) work(i * grain, std::min(count, (i + 1) * grain));
  });
}

inline bool known(at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16 || type == at::kDouble; }

// The type in which elements of a type are summed.
inline at::ScalarType accumulator(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// f(A{}, T{}) with the types of the accumulator and of the elements.
template <class F>
void for_type(at::ScalarType type, const F& f) {
  if (type == at::kDouble) {
    f(double{}, double{});
  } else if (type == at::kFloat) {
    f(float{}, float{});
  } else {
    f(float{}, uint16_t{});
  }
}

// A matrix whose rows are contiguous: itself where it is one.
inline at::Tensor with_rows(const at::Tensor& x) { return x.stride(1) == 1 || x.size(1) <= 1 ? x : x.contiguous(); }

inline void check_matrix(const at::Tensor& x, const char* op, const char* name) {
  TORCH_CHECK(x.dim() == 2 && x.device().is_cpu(), op, ": ", name, " must be a matrix on the CPU");
  TORCH_CHECK(known(x.scalar_type()), op, ": ", name, " is ", x.scalar_type(),
              "; compiled for float32, bfloat16 and float64 (kernels=reference takes others)");
}

// offsets [N + 1] int64 and columns [m] int32 of a table over `vocab` columns, all within their bounds;
// `over` says what the columns are of.
inline void check_table(const at::Tensor& offsets, const at::Tensor& columns, int64_t vocab, const char* op,
                        const char* over = "rows of the weight") {
  TORCH_CHECK(
      offsets.dim() == 1 && offsets.scalar_type() == at::kLong && offsets.is_contiguous() && offsets.size(0) >= 1, op,
      ": offsets must be contiguous [N + 1] int64");
  TORCH_CHECK(
      columns.dim() == 1 && columns.scalar_type() == at::kInt && columns.is_contiguous() && columns.size(0) < INT32_MAX,
      op, ": columns must be contiguous [m] int32");
  const int64_t* o = offsets.const_data_ptr<int64_t>();
  const int64_t n = offsets.size(0) - 1;
  bool rises = o[0] == 0 && o[n] == columns.size(0);
  for (int64_t t = 0; t < n; ++t) rises &= o[t] <= o[t + 1];
  TORCH_CHECK(rises, op, ": offsets must rise from 0 to the ", columns.size(0), " columns");
  const int32_t* c = columns.const_data_ptr<int32_t>();
  uint32_t most = 0;  // a negative column is a huge one
  for (int64_t i = 0; i < columns.size(0); ++i) most = std::max(most, static_cast<uint32_t>(c[i]));
  TORCH_CHECK(columns.size(0) == 0 || most < static_cast<uint64_t>(vocab), op, ": a column lies outside the ", vocab,
              " ", over);
}

inline void check_gold(const at::Tensor& gold, int64_t positions, int64_t entries, const char* op) {
  TORCH_CHECK(gold.dim() == 1 && gold.scalar_type() == at::kLong && gold.is_contiguous() && gold.size(0) == positions,
              op, ": gold must be contiguous [", positions, "] int64");
  const int64_t* g = gold.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < positions; ++t) {
    TORCH_CHECK(g[t] >= -1 && g[t] < entries, op, ": gold of position ", t, " points outside the ", entries,
                " columns");
  }
}

// For a table that was checked: the gold entry of each position must be one of its own, or -1.
inline void check_gold_of(const at::Tensor& offsets, const at::Tensor& gold, const char* op) {
  const int64_t n = offsets.size(0) - 1;
  const int64_t* o = offsets.const_data_ptr<int64_t>();
  check_gold(gold, n, o[n], op);
  const int64_t* g = gold.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < n; ++t) {
    TORCH_CHECK(g[t] < 0 || (o[t] <= g[t] && g[t] < o[t + 1]), op, ": gold of position ", t, " points outside its set");
  }
}

// For a table that was checked: the targets of its entries, where there are any, are as many numbers of `kind`.
inline void check_targets(const std::optional<at::Tensor>& targets, int64_t entries, at::ScalarType kind,
                          const char* op) {
  TORCH_CHECK(!targets || (targets->dim() == 1 && targets->size(0) == entries && targets->scalar_type() == kind &&
                           targets->is_contiguous() && targets->device().is_cpu()),
              op, ": targets must be contiguous [", entries, "] ", kind, " on the CPU");
}

// sum y z of the entries begin..end of a position, in their order; without targets y it is the gold logit, if here.
template <class A>
A aimed(const A* z, const A* targets, int64_t begin, int64_t end, int64_t gold) {
  if (!targets) return gold < 0 ? A(0) : z[gold];
  double sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += static_cast<double>(targets[i]) * static_cast<double>(z[i]);
  return static_cast<A>(sum);
}

}  // namespace megatron_replay
