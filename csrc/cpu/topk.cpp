// The most probable columns of each row, exactly, and the row's log-sum-exp in float64.
// The k largest columns lie in the k blocks that come first by (maximum descending, block ascending), and none is below
// the least of these maxima. So only a few of k blocks' columns are ever compared.
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
// Blocks whose largest term is below exp(-46) of the row's largest so far add less than 1e-20 a
// column, and are left out of the sum.
constexpr double kNothing = -46;

// The bits of 2^(j / 16), less j 2^48: with n 2^48 added for an n that is j modulo 16, they are those of 2^(n / 16).
alignas(64) constexpr uint64_t kRoots[16] = {
    0x3ff0000000000000, 0x3fefb5586cf9890f, 0x3fef72b83c7d517b, 0x3fef387a6e756238,
    0x3fef06fe0a31b715, 0x3feedea64c123422, 0x3feebfdad5362a27, 0x3feeab07dd485429,
    0x3feea09e667f3bcd, 0x3feea11473eb0187, 0x3feeace5422aa0db, 0x3feec49182a3f090,
    0x3feee89f995ad3ad, 0x3fef199bdd85529c, 0x3fef5818dcfba487, 0x3fefa4afa2a490da,
};

// kRoots[n modulo 16] of each n.
template <int kBytes>
ALWAYS_INLINE Vector<uint64_t, kBytes> roots(const Vector<uint64_t, kBytes>& n) {
#ifndef __clang__  // which has no __builtin_shuffle
  if constexpr (kBytes == 64) return __builtin_shuffle(load<uint64_t, 64>(kRoots), load<uint64_t, 64>(kRoots + 8), n);
#endif
  Vector<uint64_t, kBytes> found;
  for (size_t i = 0; i < kBytes / sizeof(uint64_t); ++i) found[i] = kRoots[n[i] % 16];
  return found;
}

// x = exp(x) for x in [-700, 0], to 1e-14, as 2^(n / 16) 2^(f / 16) with an integer n and |f| <= 1/2. Two vectors at a
// time: the operations on one wait for each other.
template <int kBytes>
ALWAYS_INLINE void exponentials(Vector<double, kBytes> (&x)[2]) {
  using Doubles = Vector<double, kBytes>;
  using Bits = Vector<uint64_t, kBytes>;
  // 1.5 2^52: adding it rounds to an integer, which the low bits then hold
  constexpr double kMagic = 6755399441055744.0;
  // of 2^(f / 16) = 1 + c1 f + .. + c5 f^5, c5 first: those with the least relative error, 6e-15
  constexpr double kPowers[] = {1.2715612969055873e-09, 1.4676419896158336e-07, 1.3550807791626494e-05,
                                9.383847925618033e-04, 4.332169878499582e-02};
  Doubles shifted[2], p[2];
#pragma GCC unroll 2
  for (int m = 0; m < 2; ++m) {
    x[m] *= 23.083120654223414;  // 16 / ln 2
    shifted[m] = x[m] + kMagic;
    x[m] -= shifted[m] - kMagic;
    p[m] = kPowers[0] * x[m] + kPowers[1];
  }
#pragma GCC unroll 4
  for (int i = 2; i < 5; ++i) {
#pragma GCC unroll 2
    for (int m = 0; m < 2; ++m) p[m] = p[m] * x[m] + kPowers[i];
  }
#pragma GCC unroll 2
  for (int m = 0; m < 2; ++m) {
    const Bits n = reinterpret_cast<Bits>(shifted[m]);
    const Doubles power = reinterpret_cast<Doubles>(roots<kBytes>(n) + (n << 48));
    x[m] = power + power * (p[m] * x[m]);
  }
}

// sums += exp(x - top) of a block.
template <class A, int kBytes>
ALWAYS_INLINE void add_block(const A* x, double top, double* sums) {
  constexpr int64_t kStep = kBytes / sizeof(double);
  const Vector<double, kBytes> least = Vector<double, kBytes>{} - 700.0;
  for (int64_t lane = 0; lane < 8; lane += kStep) {
    Vector<double, kBytes> sum = load<double, kBytes>(sums + lane);
#pragma GCC unroll 1
    for (int64_t i = lane; i < kBlockWidth; i += 16) {
      Vector<double, kBytes> some[2];
#pragma GCC unroll 2
      for (int64_t m = 0; m < 2; ++m) {
        some[m] = __builtin_convertvector((load<A, kStep * sizeof(A)>(x + i + 8 * m)), Vector<double, kBytes>) - top;
        some[m] = some[m] < least ? least : some[m];
      }
      exponentials<kBytes>(some);
      sum += some[0];
      sum += some[1];
    }
    store<double, kBytes>(sums + lane, sum);
  }
}

// The largest of a block; `check` becomes NaN where a lane has seen one.
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
      check = some == some ? check : some;
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
  bool operator<(const Candidate& other) const {
    return value > other.value || (value == other.value && column < other.column);
  }
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

// The state of a row so far: its largest, the sums of exp(x - top), and whether it has neither NaN nor +inf.
template <class A>
struct Known {
  A top = -std::numeric_limits<A>::infinity();
  double sums[8] = {};
  bool usable = true;
};

// The maxima of the blocks and the state of the row, in one visit: a block is in the cache when its exponentials are
// made.
template <int kBytes, class A>
ALWAYS_INLINE void scan_body(const A* row, int64_t blocks, A* tops, Known<A>& known) {
  Vector<A, kBytes> check = {};
  for (int64_t b = 0; b < blocks; ++b) {
    const A* x = row + b * kBlockWidth;
    tops[b] = largest<A, kBytes>(x, check);
    const double step = static_cast<double>(tops[b]) - static_cast<double>(known.top);
    if (step > 0) {
      for (double& sum : known.sums) sum *= std::exp(-step);
      known.top = tops[b];
    }
    if (step >= kNothing) add_block<A, kBytes>(x, static_cast<double>(known.top), known.sums);
  }
  known.usable = known.top < std::numeric_limits<A>::infinity();
  for (size_t i = 0; i < kBytes / sizeof(A); ++i) known.usable &= check[i] == 0;
}

PER_WIDTH(scan, (class A), (A), (const A* row, int64_t blocks, A* tops, Known<A>& known), (row, blocks, tops, known));

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

template <class A, class T>
void select_row(const T* x, int64_t width, int64_t k, Scratch<A>& s, const Top<A>& out, int level) {
  const int64_t blocks = (width + kBlockWidth - 1) / kBlockWidth;
  const A* row = s.row.data();
  if (std::is_same_v<A, T> && width % kBlockWidth == 0) {
    row = reinterpret_cast<const A*>(x);
  } else {
    for (int64_t i = 0; i < width; ++i) s.row[i] = load_one<A>(x + i);
  }
  Known<A> known;
  scan<A>[level](row, blocks, s.tops.data(), known);
  const double top = static_cast<double>(known.top);
  const bool empty = known.top == -std::numeric_limits<A>::infinity();
  *out.lse = !known.usable ? std::numeric_limits<double>::quiet_NaN() : empty ? top : top + std::log(fold(known.sums));
  if (known.usable) {
    gather(row, width, blocks, k, s);
  } else {  // nothing to be ranked
    s.found.clear();
    for (int64_t i = 0; i < k; ++i) s.found.push_back({row[i], static_cast<int32_t>(i)});
  }
  const auto end = s.found.begin() + k;
  if (known.usable) {
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
  TORCH_CHECK(most >= 1 && logits.size(1) < INT32_MAX, "topk_rows: k is ", most, " and the rows have ", logits.size(1),
              " columns");
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
    const Top<A> out = {values.mutable_data_ptr<A>(), columns.mutable_data_ptr<int64_t>(),
                        lse.mutable_data_ptr<double>()};
    for_each_share(n, 4, [&](int64_t first, int64_t last) {
      const int64_t blocks = (width + kBlockWidth - 1) / kBlockWidth;
      Scratch<A> scratch;
      scratch.row.assign(blocks * kBlockWidth, -std::numeric_limits<A>::infinity());
      scratch.tops.resize(blocks);
      for (int64_t i = first; i < last; ++i) {
        select_row<A, T>(rows + i * x.stride(0), width, k, scratch,
                         {out.values + i * k, out.columns + i * k, out.lse + i}, level);
      }
    });
  });
  return {values, columns, lse};
}

}  // namespace megatron_replay
