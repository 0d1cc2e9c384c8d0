// The most probable columns of each row, exactly, and the row's log-sum-exp in float64.
// The k largest columns lie in the k blocks that come first by (maximum descending, block ascending), and none is below the least of these
// maxima: so only a few of k blocks' columns are ever compared.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lanes.h"
#include "ragged.h"
#include "restricted.h"

namespace megatron_replay {
namespace {

constexpr int64_t kBlockWidth = 64;
// Blocks whose largest term is below exp(-46) of the row's largest add less than 1e-20 a column, and are left out of the sum.
constexpr double kNothing = -46;

// exp(x) for x in [-700, 0], to 1e-14: exp(r / 4)^4 2^n with |r| < ln 2 / 2 and Taylor's polynomial, no table and no branch.
template <int kBytes>
ALWAYS_INLINE Vector<double, kBytes> exponential(const Vector<double, kBytes>& x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 2^52: adding it rounds to an integer, which the low bits then hold
  const Vector<double, kBytes> shifted = x * 1.4426950408889634 + kMagic;
  const Vector<double, kBytes> r = (x - (shifted - kMagic) * 0.6931471805599453) * 0.25;
  Vector<double, kBytes> p = r * (1.0 / 40320) + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  p *= p;
  p *= p;
  using Bits = Vector<int64_t, kBytes>;
  return reinterpret_cast<Vector<double, kBytes>>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 52));
}

// sums += exp(x - top) of a block.
template <class A, int kBytes>
ALWAYS_INLINE void add_block(const A* x, double top, double* sums) {
  constexpr int64_t kStep = kBytes / sizeof(double);
  for (int64_t lane = 0; lane < 8; lane += kStep) {
    Vector<double, kBytes> sum = load<double, kBytes>(sums + lane);
    for (int64_t i = lane; i < kBlockWidth; i += 8) {
      const auto some = load<A, kStep * sizeof(A)>(x + i);
      Vector<double, kBytes> d = __builtin_convertvector(some, Vector<double, kBytes>) - top;
      const Vector<double, kBytes> least = Vector<double, kBytes>{} - 700.0;
      d = d < least ? least : d;
      sum += exponential<kBytes>(d);
    }
    store<double, kBytes>(sums + lane, sum);
  }
}

// The largest of a block; `check` stays 0 as long as everything is finite.
template <class A, int kBytes>
ALWAYS_INLINE A largest(const A* x, Vector<A, kBytes>& check) {
  constexpr int64_t kStep = kBytes / sizeof(A), kParts = 64 / kBytes;
  using V = Vector<A, kBytes>;
  V top[kParts];
#pragma GCC unroll 4
  for (int64_t p = 0; p < kParts; ++p) top[p] = load<A, kBytes>(x + p * kStep);
#pragma GCC unroll 8
  for (int64_t i = 0; i < kBlockWidth; i += kSums<A>) {
#pragma GCC unroll 4
    for (int64_t p = 0; p < kParts; ++p) {
      const V some = load<A, kBytes>(x + i + p * kStep);
      check += some - some;
      top[p] = some > top[p] ? some : top[p];
    }
  }
  A lanes[kSums<A>];
  __builtin_memcpy(lanes, top, sizeof lanes);
  for (int64_t half = kSums<A> / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
  }
  return lanes[0];
}

template <class A>
struct Candidate {
  A value;
  int32_t column;
  bool operator<(const Candidate& other) const { return value > other.value || (value == other.value && column < other.column); }
};

// Buffers of a thread; `row` is padded with -inf to whole blocks.
template <class A>
struct Scratch {
  std::vector<A> row, tops, order;
  std::vector<Candidate<A>> found;
};

template <class A>
struct Top {
  A* values;
  int64_t* columns;
  double* lse;
};

template <int kBytes, class A>
ALWAYS_INLINE void maxima_body(const A* row, int64_t blocks, A* tops, A& top, bool& usable) {
  Vector<A, kBytes> check = {};
  for (int64_t b = 0; b < blocks; ++b) {
    tops[b] = largest<A, kBytes>(row + b * kBlockWidth, check);
    top = tops[b] > top ? tops[b] : top;
  }
  A lanes[kBytes / sizeof(A)], sum = 0;
  __builtin_memcpy(lanes, &check, sizeof lanes);
  for (const A lane : lanes) sum += lane;
  if (sum == 0) return;
  // -inf is allowed, NaN and +inf are not
  for (int64_t i = 0; i < blocks * kBlockWidth; ++i) usable &= row[i] < std::numeric_limits<A>::infinity();
}

template <int kBytes, class A>
ALWAYS_INLINE void total_body(const A* row, int64_t blocks, const A* tops, double top, double* sums) {
  for (int64_t b = 0; b < blocks; ++b) {
    if (static_cast<double>(tops[b]) - top >= kNothing) add_block<A, kBytes>(row + b * kBlockWidth, top, sums);
  }
}

PER_WIDTH(maxima, (class A), (A), (const A* row, int64_t blocks, A* tops, A& top, bool& usable), (row, blocks, tops, top, usable));
PER_WIDTH(total, (class A), (A), (const A* row, int64_t blocks, const A* tops, double top, double* sums), (row, blocks, tops, top, sums));

// The columns of the first k blocks that are not below the least of their maxima.
template <class A>
void gather(const A* row, int64_t width, int64_t blocks, int64_t k, Scratch<A>& s) {
  A bound = -std::numeric_limits<A>::infinity();
  int64_t equal = blocks;  // how many blocks with a maximum equal to the bound are still to be taken
  if (blocks > k) {
    s.order.assign(s.tops.begin(), s.tops.begin() + blocks);
    std::nth_element(s.order.begin(), s.order.begin() + (k - 1), s.order.end(), std::greater<A>());
    bound = s.order[k - 1];
    equal = k - std::count_if(s.order.begin(), s.order.begin() + (k - 1), [&](A x) { return x > bound; });
  }
  s.found.clear();
  for (int64_t b = 0; b < blocks; ++b) {
    if (!(s.tops[b] >= bound)) continue;
    if (s.tops[b] == bound && equal-- <= 0) continue;
    const int64_t end = std::min(width, (b + 1) * kBlockWidth);
    for (int64_t i = b * kBlockWidth; i < end; ++i) {
      if (row[i] >= bound) s.found.push_back({row[i], static_cast<int32_t>(i)});
    }
  }
}

// The maximum of the columns that do not fill a block.
template <class A>
void last_block(const A* row, int64_t width, A* tops, A& top, bool& usable) {
  const int64_t whole = width / kBlockWidth;
  if (width == whole * kBlockWidth) return;
  A most = -std::numeric_limits<A>::infinity();
  for (int64_t i = whole * kBlockWidth; i < width; ++i) {
    usable &= row[i] < std::numeric_limits<A>::infinity();
    most = row[i] > most ? row[i] : most;
  }
  tops[whole] = most;
  top = most > top ? most : top;
}

template <class A, class T>
void select_row(const T* x, int64_t width, int64_t k, Scratch<A>& s, const Top<A>& out, int level) {
  const int64_t blocks = (width + kBlockWidth - 1) / kBlockWidth;
  const A* row = s.row.data();
  if (std::is_same_v<A, T> && width % kBlockWidth == 0) {
    row = reinterpret_cast<const A*>(x);
  } else {
    for (int64_t i = 0; i < width; ++i) s.row[i] = load_one<A>(x + i);
  }
  A top = -std::numeric_limits<A>::infinity();
  bool usable = true;
  double sums[8] = {};
  maxima<A>[level](row, width / kBlockWidth, s.tops.data(), top, usable);
  last_block(row, width, s.tops.data(), top, usable);
  if (usable) total<A>[level](row, blocks, s.tops.data(), static_cast<double>(top), sums);
  const bool empty = top == -std::numeric_limits<A>::infinity();
  *out.lse = !usable ? std::numeric_limits<double>::quiet_NaN() : empty ? static_cast<double>(top) : static_cast<double>(top) + std::log(fold(sums));
  if (usable) {
    gather(row, width, blocks, k, s);
  } else {  // nothing to be ranked
    s.found.clear();
    for (int64_t i = 0; i < k; ++i) s.found.push_back({row[i], static_cast<int32_t>(i)});
  }
  const auto end = s.found.begin() + k;
  if (usable) {
    if (end != s.found.end()) std::nth_element(s.found.begin(), end - 1, s.found.end());
    std::sort(s.found.begin(), end);
  }
  for (int64_t i = 0; i < k; ++i) {
    out.values[i] = s.found[i].value;
    out.columns[i] = s.found[i].column;
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> topk_rows(const at::Tensor& logits, int64_t most) {
  check_matrix(logits, "topk_rows", "logits");
  TORCH_CHECK(most >= 1 && logits.size(1) < INT32_MAX, "topk_rows: k is ", most, " and the rows have ", logits.size(1), " columns");
  const at::Tensor x = with_rows(logits);
  const int64_t n = x.size(0), width = x.size(1), k = std::min(most, width);
  const auto options = x.options();
  at::Tensor values = at::empty({n, k}, options.dtype(accumulator(x.scalar_type())));
  at::Tensor columns = at::empty({n, k}, options.dtype(at::kLong)), lse = at::empty({n}, options.dtype(at::kDouble));
  if (!width) lse.fill_(-std::numeric_limits<double>::infinity());
  if (!n || !width) return {values, columns, lse};
  const int level = static_cast<int>(isa());
  for_type(x.scalar_type(), [&](auto a, auto t) {
    using A = decltype(a);
    using T = decltype(t);
    const T* rows = static_cast<const T*>(x.const_data_ptr());
    const Top<A> out = {values.mutable_data_ptr<A>(), columns.mutable_data_ptr<int64_t>(), lse.mutable_data_ptr<double>()};
    for_each_share(n, 4, [&](int64_t first, int64_t last) {
      const int64_t blocks = (width + kBlockWidth - 1) / kBlockWidth;
      Scratch<A> scratch;
      scratch.row.assign(blocks * kBlockWidth, -std::numeric_limits<A>::infinity());
      scratch.tops.resize(blocks);
      for (int64_t i = first; i < last; ++i) {
        select_row<A, T>(rows + i * x.stride(0), width, k, scratch, {out.values + i * k, out.columns + i * k, out.lse + i}, level);
      }
    });
  });
  return {values, columns, lse};
}

}  // namespace megatron_replay
