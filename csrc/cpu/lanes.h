// Vectors of 16, 32 or 64 bytes, as wide as an instruction set has them, and sums whose order does not depend on which.
//
// A is what is summed in (float or double), T what is stored (the same, or bfloat16 as uint16_t).
// Sums keep 64 bytes of partial sums
// side by side, whatever the vector's width: lane l has the elements l, l + lanes, ...
#pragma once

#include <cstdint>
#include <type_traits>

#include "isa.h"

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are only passed to functions that are inlined
#endif

namespace megatron_replay {

template <class A, int kBytes>
struct VectorOf {
  typedef A type __attribute__((vector_size(kBytes)));
};
template <class A, int kBytes>
using Vector = typename VectorOf<A, kBytes>::type;

template <class A>
constexpr int64_t kSums = 64 / sizeof(A);
// Rows taken at a time.
constexpr int kRows = 8;

template <class A, int kBytes, class T>
ALWAYS_INLINE Vector<A, kBytes> load(const T* x) {
  if constexpr (std::is_same_v<A, T>) {
    Vector<A, kBytes> out;
    __builtin_memcpy(&out, x, sizeof out);
    return out;
  } else {
    static_assert(std::is_same_v<A, float> && std::is_same_v<T, uint16_t>);
    Vector<uint16_t, kBytes / 2> low;
    __builtin_memcpy(&low, x, sizeof low);
    return reinterpret_cast<Vector<A, kBytes>>(__builtin_convertvector(low, Vector<uint32_t, kBytes>) << 16);
  }
}

template <class A, int kBytes>
ALWAYS_INLINE void store(A* x, const Vector<A, kBytes>& value) {
  __builtin_memcpy(x, &value, sizeof value);
}

template <class A, class T>
ALWAYS_INLINE A load_one(const T* x) {
  if constexpr (std::is_same_v<A, T>) {
    return *x;
  } else {
    const uint32_t bits = static_cast<uint32_t>(*x) << 16;
    float out;
    __builtin_memcpy(&out, &bits, sizeof out);
    return out;
  }
}

// Ask for the 64 bytes of a row that hold element k.
template <class T>
ALWAYS_INLINE void fetch(const T* row, int64_t k) {
  __builtin_prefetch(row + k, 0, 2);
}

// The sum of the partial sums.
template <class A>
ALWAYS_INLINE A fold(A* lanes) {
  for (int64_t half = kSums<A> / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// out[r] = x . rows[r] for R rows, while the `next` rows are fetched.
template <class A, int kBytes, int R, class T>
ALWAYS_INLINE void dots(const A* x, const T* const* rows, const T* const* next, int64_t width, A* out) {
  constexpr int64_t kStep = kBytes / sizeof(A), kParts = 64 / kBytes;
  // as many rows at a time as there are registers for
  constexpr int kGroup = R < kBytes / 8 ? R : kBytes / 8;
  const int64_t whole = width / kSums<A> * kSums<A>;
#pragma GCC unroll 1
  for (int g = 0; g < R; g += kGroup) {
    Vector<A, kBytes> sums[kGroup][kParts] = {};
    for (int64_t k = 0; k < whole; k += kSums<A>) {
#pragma GCC unroll 8
      for (int r = 0; r < kGroup; ++r) fetch(next[g + r], k);
#pragma GCC unroll 4
      for (int64_t p = 0; p < kParts; ++p) {
        const Vector<A, kBytes> a = load<A, kBytes>(x + k + p * kStep);
#pragma GCC unroll 8
        for (int r = 0; r < kGroup; ++r) sums[r][p] += a * load<A, kBytes>(rows[g + r] + k + p * kStep);
      }
    }
    for (int r = 0; r < kGroup; ++r) {
      A lanes[kSums<A>];
      __builtin_memcpy(lanes, sums[r], sizeof lanes);
      for (int64_t k = whole; k < width; ++k) lanes[k - whole] += x[k] * load_one<A>(rows[g + r] + k);
      out[g + r] = fold(lanes);
    }
  }
}

// to = add + (from + sum of factors[r] rows[r]), where `from` and `add` may be null; R rows in their
// order, while `next` are fetched.
template <class A, int kBytes, int R, class T>
ALWAYS_INLINE void combine(A* to, const A* add, const A* from, const T* const* rows, const A* factors,
                           const T* const* next, int64_t width) {
  constexpr int64_t kStep = kBytes / sizeof(A), kParts = 64 / kBytes;
  const int64_t whole = width / kSums<A> * kSums<A>;
  for (int64_t k = 0; k < whole; k += kSums<A>) {
    if (next) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) fetch(next[r], k);
    }
    Vector<A, kBytes> sum[kParts] = {};
    if (from) {
#pragma GCC unroll 4
      for (int64_t p = 0; p < kParts; ++p) sum[p] = load<A, kBytes>(from + k + p * kStep);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int64_t p = 0; p < kParts; ++p) sum[p] += factors[r] * load<A, kBytes>(rows[r] + k + p * kStep);
    }
    if (add) {
#pragma GCC unroll 4
      for (int64_t p = 0; p < kParts; ++p) sum[p] = load<A, kBytes>(add + k + p * kStep) + sum[p];
    }
#pragma GCC unroll 4
    for (int64_t p = 0; p < kParts; ++p) store<A, kBytes>(to + k + p * kStep, sum[p]);
  }
  for (int64_t k = whole; k < width; ++k) {
    A sum = from ? from[k] : A(0);
    for (int r = 0; r < R; ++r) sum += factors[r] * load_one<A>(rows[r] + k);
    to[k] = add ? add[k] + sum : sum;
  }
}

// to = (to +) sum of factors[r] rows[r], and to2 likewise with factors2; the sums before count where `more`. R rows in
// their order, each loaded once for both.
template <class A, int kBytes, int R, class T>
ALWAYS_INLINE void combine_both(A* to, A* to2, bool more, const T* const* rows, const A* factors, const A* factors2,
                                int64_t width) {
  constexpr int64_t kStep = kBytes / sizeof(A);
  const int64_t whole = width / kSums<A> * kSums<A>;
  A first[R], second[R];  // in registers: `to` cannot be the same memory
  for (int r = 0; r < R; ++r) {
    first[r] = factors[r];
    second[r] = factors2[r];
  }
  for (int64_t k = 0; k < whole; k += kStep) {
    Vector<A, kBytes> sum = {}, sum2 = {};
    if (more) {
      sum = load<A, kBytes>(to + k);
      sum2 = load<A, kBytes>(to2 + k);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector<A, kBytes> row = load<A, kBytes>(rows[r] + k);
      sum += first[r] * row;
      sum2 += second[r] * row;
    }
    store<A, kBytes>(to + k, sum);
    store<A, kBytes>(to2 + k, sum2);
  }
  for (int64_t k = whole; k < width; ++k) {
    A sum = more ? to[k] : A(0), sum2 = more ? to2[k] : A(0);
    for (int r = 0; r < R; ++r) {
      const A row = load_one<A>(rows[r] + k);
      sum += first[r] * row;
      sum2 += second[r] * row;
    }
    to[k] = sum;
    to2[k] = sum2;
  }
}

}  // namespace megatron_replay
