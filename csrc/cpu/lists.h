// The common parts of the kernels over lists of tensors: cutting them into blocks for the threads, bfloat16, and sums
// in a fixed order.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "isa.h"

namespace megatron_replay {

// Elements one thread takes at a time. A constant, so that no sum depends on the number of threads.
constexpr int64_t kBlock = 32768;
// Elements a kernel works on at a time: its buffers of them stay in the level-1 cache.
constexpr int64_t kChunk = 1024;
// The distance in elements at which memory is asked for ahead of the work, and the elements asked for at a time. The
// processor's own prefetching stops at each page, and asking for more at once fills its miss buffers. Measured on
// AVX-512: 512 and 64 take 0.64 of the time of none, 1024 and 256 more than none.
constexpr int64_t kAhead = 512;
constexpr int64_t kStride = 64;
// The number of partial sums side by side, and of chained additions that each gets a turn. Both are fixed, so that no
// sum depends on the vector's length.
constexpr int64_t kLanes = 64;
constexpr int64_t kTurn = 4 * kLanes;
static_assert(kChunk % kTurn == 0);

struct Block {
  int64_t tensor, begin, end;
};

inline std::vector<Block> blocks_of(const std::vector<int64_t>& lengths) {
  std::vector<Block> blocks;
  for (size_t i = 0; i < lengths.size(); ++i) {
    for (int64_t begin = 0; begin < lengths[i]; begin += kBlock) {
      blocks.push_back({static_cast<int64_t>(i), begin, std::min(begin + kBlock, lengths[i])});
    }
  }
  return blocks;
}

template <class Work>
void for_each_block(const std::vector<Block>& blocks, const Work& work) {
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) work(i);
  });
}

// Ask for the stride of elements that lies kAhead further on; past the end of a tensor that is no fault.
template <class T>
ALWAYS_INLINE void prefetch(const T* x) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < kStride; i += kLine) __builtin_prefetch(x + kAhead + i);
}

ALWAYS_INLINE void widen(const uint16_t* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
    std::memcpy(&out[i], &bits, sizeof bits);
  }
}

// Round to bfloat16, ties to even; NaN stays NaN.
ALWAYS_INLINE void narrow(const float* x, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &x[i], sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    out[i] = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
  }
}

// sums[l] += the products x y of the elements l, l + 64, ... of a whole number of turns; exact
// products of float32 in float64.
template <class T>
ALWAYS_INLINE void add_products(const T* __restrict x, const T* __restrict y, double* __restrict sums, int64_t n) {
  for (int64_t start = 0; start < n; start += kTurn) {
    const T* __restrict a = x + start;
    const T* __restrict b = y + start;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      double sum = sums[lane];
      for (int64_t i = 0; i < 4; ++i) {
        sum += static_cast<double>(a[lane + i * kLanes]) * static_cast<double>(b[lane + i * kLanes]);
      }
      sums[lane] = sum;
    }
  }
}

ALWAYS_INLINE double folded(const double* sums) {
  double lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = sums[i];
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace megatron_replay
