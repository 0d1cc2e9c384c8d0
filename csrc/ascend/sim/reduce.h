// Reductions of each repeat to one number, and broadcasts of one number to a block.
#pragma once

#include "lanes.h"

namespace AscendC {

enum class ReduceOrder { ORDER_VALUE_INDEX, ORDER_INDEX_VALUE, ORDER_ONLY_VALUE, ORDER_ONLY_INDEX };

namespace detail {

// Lanes of a repeat are added as a binary tree of neighbours; a lane that is masked out counts as nothing.
inline float tree(float* lanes, uint32_t count) {
  for (; count > 1; count /= 2) {
    for (uint32_t i = 0; i < count / 2; ++i) lanes[i] = lanes[2 * i] + lanes[2 * i + 1];
  }
  return lanes[0];
}

template <class F>
void reduce(const char* api, const LocalTensor<float>& dst, const LocalTensor<float>& src, int32_t lanes,
            int32_t repeats, int32_t dst_stride, int32_t block_stride, int32_t repeat_stride, float nothing, F f) {
  check_repeats(api, repeats);
  const Mask mask = first_lanes<float>(api, lanes);
  dst.usable(api, repeats ? static_cast<int64_t>(repeats - 1) * dst_stride + 1 : 0, sizeof(float));
  src.usable(api, 0);
  ascend_sim::Core& core = ascend_sim::core();
  core.issue(ascend_sim::kVector, repeats * sizeof(float));
  core.counters.repeats += repeats;
  const Operand from = operand(src, block_stride, repeat_stride);
  for (int32_t repeat = 0; repeat < repeats; ++repeat) {
    float values[64];
    for (uint32_t block = 0; block < 8; ++block) {
      const uint32_t here = std::min<uint32_t>(8, lanes - std::min<uint32_t>(lanes, block * 8));
      const uint32_t at = here ? block_of(api, from, repeat, block) : 0;
      if (here) core.read(api, ascend_sim::kVector, at, here * sizeof(float));
      for (uint32_t i = 0; i < 8; ++i) {
        values[block * 8 + i] = mask.has(block * 8 + i) ? reinterpret_cast<const float*>(core.at(at))[i] : nothing;
      }
    }
    const uint32_t to = dst.address() + repeat * dst_stride * sizeof(float);
    core.write(api, ascend_sim::kVector, to, sizeof(float));
    *reinterpret_cast<float*>(core.at(to)) = f(values);
  }
}

}  // namespace detail

inline void WholeReduceSum(const LocalTensor<float>& dst, const LocalTensor<float>& src, const int32_t mask,
                           const int32_t repeats, const int32_t dstRepStride, const int32_t srcBlkStride,
                           const int32_t srcRepStride) {
  detail::reduce("WholeReduceSum", dst, src, mask, repeats, dstRepStride, srcBlkStride, srcRepStride, 0.0f,
                 [](float* x) { return detail::tree(x, 64); });
}

inline void WholeReduceMax(const LocalTensor<float>& dst, const LocalTensor<float>& src, const int32_t mask,
                           const int32_t repeats, const int32_t dstRepStride, const int32_t srcBlkStride,
                           const int32_t srcRepStride, ReduceOrder order) {
  if (order != ReduceOrder::ORDER_ONLY_VALUE) ascend_sim::fail("WholeReduceMax: the stand-in knows ORDER_ONLY_VALUE");
  detail::reduce("WholeReduceMax", dst, src, mask, repeats, dstRepStride, srcBlkStride, srcRepStride, -INFINITY,
                 [](float* x) {
                   float top = x[0];
                   for (int i = 1; i < 64; ++i) top = x[i] > top || x[i] != x[i] ? x[i] : top;
                   return top;
                 });
}

// Each of eight elements fills one block.
template <class T>
void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint8_t repeats, const BrcbRepeatParams& p) {
  dst.usable("Brcb", 0);
  src.usable("Brcb", 8 * repeats);
  ascend_sim::Core& core = ascend_sim::core();
  core.issue(ascend_sim::kVector, repeats * ascend_sim::kRepeatBytes);
  core.counters.repeats += repeats;
  core.read("Brcb", ascend_sim::kVector, src.address(), 8 * repeats * sizeof(T));
  const detail::Operand to = detail::operand(dst, p.dstBlkStride, p.dstRepStride);
  for (uint32_t repeat = 0; repeat < repeats; ++repeat) {
    for (uint32_t block = 0; block < 8; ++block) {
      const uint32_t at = detail::block_of("Brcb", to, repeat, block);
      core.write("Brcb", ascend_sim::kVector, at, ascend_sim::kBlockBytes);
      std::fill_n(reinterpret_cast<T*>(core.at(at)), ascend_sim::kBlockBytes / sizeof(T),
                  src.data()[repeat * 8 + block]);
    }
  }
}

}  // namespace AscendC
