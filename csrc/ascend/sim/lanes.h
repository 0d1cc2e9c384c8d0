// The walk of a vector instruction through the buffer: repeats of eight blocks of 32 bytes, with strides and a mask.
// Its rules are checked here.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "tensor.h"

namespace AscendC {

struct BinaryRepeatParams {
  uint8_t dstBlkStride = 1, src0BlkStride = 1, src1BlkStride = 1, dstRepStride = 8, src0RepStride = 8,
          src1RepStride = 8;
};

struct UnaryRepeatParams {
  uint16_t dstBlkStride = 1, srcBlkStride = 1;
  uint8_t dstRepStride = 8, srcRepStride = 8;
};

struct BrcbRepeatParams {
  uint16_t dstBlkStride = 1, dstRepStride = 8;
};

namespace detail {

struct Mask {
  uint64_t bits[2];
  bool has(uint32_t lane) const { return bits[lane / 64] >> (lane % 64) & 1; }
};

template <class T>
Mask first_lanes(const char* api, uint64_t count) {
  constexpr uint32_t kLanes = ascend_sim::kRepeatBytes / sizeof(T);
  if (count < 1 || count > kLanes) {
    ascend_sim::fail("%s: a mask of %llu lanes, and a repeat has 1..%u", api, static_cast<unsigned long long>(count),
                     kLanes);
  }
  const auto low = [](uint64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; };
  return {{low(count), count > 64 ? low(count - 64) : 0}};
}

inline void check_repeats(const char* api, int64_t repeats) {
  if (repeats < 0 || repeats > ascend_sim::kMaxRepeats) {
    ascend_sim::fail("%s: %lld repeats, and an instruction has 0..%u", api, static_cast<long long>(repeats),
                     ascend_sim::kMaxRepeats);
  }
}

template <class T>
void check_arithmetic(const char* api) {
  if (!ascend_sim::kArithmetic<T>) {
    ascend_sim::fail("%s: bfloat16 has no arithmetic on architecture 2201; Cast to float first", api);
  }
}

// Two operands may be the same memory or disjoint, not shifted against each other.
inline void check_overlap(const char* api, uint32_t dst, uint64_t dst_bytes, uint32_t src, uint64_t src_bytes) {
  if (dst < src + src_bytes && src < dst + dst_bytes && !(dst == src && dst_bytes == src_bytes)) {
    ascend_sim::fail("%s: destination and source overlap without being the same", api);
  }
}

// One vector instruction on elements that lie side by side: dst[i] = f(i) for i < count. Level 2 of the API splits what
// is longer than 255 repeats by itself.
// `also` is what the instruction reads besides.
template <class A, class D, class F, class... S>
void elementwise_after(const char* api, A also, const LocalTensor<D>& dst, int64_t count, F f,
                       const LocalTensor<S>&... src) {
  dst.usable(api, count);
  (src.usable(api, count), ...);
  if (!count) return;
  (check_overlap(api, dst.address(), count * sizeof(D), src.address(), count * sizeof(S)), ...);
  ascend_sim::Core& core = ascend_sim::core();
  const uint64_t widest = std::max({sizeof(D), sizeof(S)...});
  core.issue(ascend_sim::kVector, count * sizeof(D));
  core.counters.repeats += (count * widest + ascend_sim::kRepeatBytes - 1) / ascend_sim::kRepeatBytes;
  (core.read(api, ascend_sim::kVector, src.address(), count * sizeof(S)), ...);
  also();
  core.write(api, ascend_sim::kVector, dst.address(), count * sizeof(D));
  D* out = dst.data();
  for (int64_t i = 0; i < count; ++i) out[i] = f(i);
}

template <class D, class F, class... S>
void elementwise(const char* api, const LocalTensor<D>& dst, int64_t count, F f, const LocalTensor<S>&... src) {
  elementwise_after(api, [] {}, dst, count, f, src...);
}

// An operand of an instruction with strides, in blocks.
struct Operand {
  uint32_t address, block_stride, repeat_stride;
  uint64_t bytes;  // of the tensor, from the address on
};

template <class T>
Operand operand(const LocalTensor<T>& tensor, uint32_t block_stride, uint32_t repeat_stride) {
  return {tensor.address(), block_stride, repeat_stride, static_cast<uint64_t>(tensor.GetSize()) * sizeof(T)};
}

inline uint32_t block_of(const char* api, const Operand& o, uint32_t repeat, uint32_t block) {
  const uint64_t offset =
      (static_cast<uint64_t>(repeat) * o.repeat_stride + block * o.block_stride) * ascend_sim::kBlockBytes;
  if (offset >= o.bytes) {
    ascend_sim::fail("%s: repeat %u, block %u lies beyond the tensor's %llu bytes", api, repeat, block,
                     static_cast<unsigned long long>(o.bytes));
  }
  return o.address + static_cast<uint32_t>(offset);
}

// One instruction with strides: dst = f(sources' blocks, lane within the block) for every active lane.
template <class T, size_t N, class F>
void strided(const char* api, const Mask& mask, int64_t repeats, const Operand& dst, const Operand (&src)[N], F f) {
  check_repeats(api, repeats);
  constexpr uint32_t kPerBlock = ascend_sim::kBlockBytes / sizeof(T);
  ascend_sim::Core& core = ascend_sim::core();
  core.issue(ascend_sim::kVector, repeats * ascend_sim::kRepeatBytes);
  core.counters.repeats += repeats;
  for (uint32_t repeat = 0; repeat < repeats; ++repeat) {
    for (uint32_t block = 0; block < 8; ++block) {
      uint32_t first = kPerBlock, last = 0;
      for (uint32_t i = 0; i < kPerBlock; ++i) {
        if (!mask.has(block * kPerBlock + i)) continue;
        first = std::min(first, i);
        last = i;
      }
      if (first == kPerBlock) continue;
      const uint32_t bytes = (last - first + 1) * sizeof(T), skip = first * sizeof(T);
      const T* from[N];
      for (size_t n = 0; n < N; ++n) {
        const uint32_t at = block_of(api, src[n], repeat, block);
        core.read(api, ascend_sim::kVector, at + skip, bytes);
        from[n] = reinterpret_cast<const T*>(core.at(at));
      }
      const uint32_t to = block_of(api, dst, repeat, block);
      core.write(api, ascend_sim::kVector, to + skip, bytes);
      for (uint32_t i = first; i <= last; ++i) {
        if (mask.has(block * kPerBlock + i)) reinterpret_cast<T*>(core.at(to))[i] = f(from, i);
      }
    }
  }
}

}  // namespace detail
}  // namespace AscendC
