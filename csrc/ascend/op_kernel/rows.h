// Arithmetic on rows of float32 in the unified buffer.
#pragma once

#include "kernel_operator.h"

namespace megatron_replay::ascend {

using namespace AscendC;

constexpr uint32_t kLanes = 64;  // float32 of a repeat
constexpr uint32_t kBlock = 8;   // float32 of a block of 32 bytes

// Elements of T as float32, which is exact.
template <typename T>
__aicore__ inline void Widen(const LocalTensor<float>& wide, const LocalTensor<T>& raw, uint32_t count) {
  if constexpr (IsSameType<T, float>::value) {
    Muls(wide, raw, 1.0f, static_cast<int32_t>(count));
  } else {
    Cast(wide, raw, RoundMode::CAST_NONE, count);
  }
}

// Every element times one number, which fills the block `factor`: no scalar has to leave the vector pipe.
__aicore__ inline void ScaleRow(const LocalTensor<float>& row, const LocalTensor<float>& source,
                                const LocalTensor<float>& factor, uint32_t width) {
  const BinaryRepeatParams broadcast{1, 1, 0, 8, 8, 0};
  const uint32_t repeats = width / kLanes, rest = width % kLanes;
  if (repeats) Mul(row, source, factor, kLanes, static_cast<uint8_t>(repeats), broadcast);
  if (rest) Mul(row[repeats * kLanes], source[repeats * kLanes], factor, rest, 1, broadcast);
}

__aicore__ inline void AddScaledRow(const LocalTensor<float>& row, const LocalTensor<float>& source,
                                    const LocalTensor<float>& factor, uint32_t width) {
  const BinaryRepeatParams broadcast{1, 1, 0, 8, 8, 0};
  const uint32_t repeats = width / kLanes, rest = width % kLanes;
  if (repeats) MulAddDst(row, source, factor, kLanes, static_cast<uint8_t>(repeats), broadcast);
  if (rest) MulAddDst(row[repeats * kLanes], source[repeats * kLanes], factor, rest, 1, broadcast);
}

}  // namespace megatron_replay::ascend
