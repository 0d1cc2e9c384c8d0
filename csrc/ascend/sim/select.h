// Comparisons to bit masks, selection and compression by them, and gathering by byte offsets.
#pragma once

#include "lanes.h"

namespace AscendC {

enum class CMPMODE { LT, GT, EQ, LE, GE, NE };
enum class SELMODE { VSEL_CMPMASK_SPR, VSEL_TENSOR_SCALAR_MODE, VSEL_TENSOR_TENSOR_MODE };

struct GatherMaskParams {
  uint8_t src0BlockStride = 1;
  uint16_t repeatTimes = 1, src0RepeatStride = 8;
  uint8_t src1RepeatStride = 0;
};

namespace detail {

inline bool holds(CMPMODE mode, float x, float y) {
  switch (mode) {
    case CMPMODE::LT: return x < y;
    case CMPMODE::GT: return x > y;
    case CMPMODE::EQ: return x == y;
    case CMPMODE::LE: return x <= y;
    case CMPMODE::GE: return x >= y;
    case CMPMODE::NE: return x != y;
  }
  return false;
}

template <class F>
void compare(const char* api, const LocalTensor<uint8_t>& dst, uint32_t count, F holds_at,
             std::initializer_list<LocalTensor<float>> src) {
  if (count * sizeof(float) % ascend_sim::kRepeatBytes) {
    ascend_sim::fail("%s: %u elements are no multiple of 256 bytes, and what is left over is not compared", api, count);
  }
  dst.usable(api, count / 8);
  ascend_sim::Core& core = ascend_sim::core();
  core.issue(ascend_sim::kVector, count / 8);
  core.counters.repeats += count / 64;
  for (const LocalTensor<float>& x : src) {
    x.usable(api, count);
    core.read(api, ascend_sim::kVector, x.address(), count * sizeof(float));
  }
  core.write(api, ascend_sim::kVector, dst.address(), count / 8);
  for (uint32_t i = 0; i < count; i += 8) {
    uint8_t bits = 0;
    for (uint32_t j = 0; j < 8; ++j) bits |= static_cast<uint8_t>(holds_at(i + j)) << j;
    dst.data()[i / 8] = bits;
  }
}

}  // namespace detail

inline void Compare(const LocalTensor<uint8_t>& dst, const LocalTensor<float>& a, const LocalTensor<float>& b,
                    CMPMODE mode, uint32_t count) {
  detail::compare("Compare", dst, count, [&](uint32_t i) { return detail::holds(mode, a.data()[i], b.data()[i]); },
                  {a, b});
}

inline void CompareScalar(const LocalTensor<uint8_t>& dst, const LocalTensor<float>& a, const float b, CMPMODE mode,
                          uint32_t count) {
  detail::compare("CompareScalar", dst, count, [&](uint32_t i) { return detail::holds(mode, a.data()[i], b); }, {a});
}

inline void Select(const LocalTensor<float>& dst, const LocalTensor<uint8_t>& mask, const LocalTensor<float>& a,
                   const LocalTensor<float>& b, SELMODE mode, uint32_t count) {
  if (mode != SELMODE::VSEL_TENSOR_TENSOR_MODE) ascend_sim::fail("Select: the stand-in knows VSEL_TENSOR_TENSOR_MODE");
  mask.usable("Select", (count + 7) / 8);
  const auto read_mask = [&] {
    ascend_sim::core().read("Select", ascend_sim::kVector, mask.address(), (count + 7) / 8);
  };
  const auto pick = [&](int64_t i) { return mask.data()[i / 8] >> (i % 8) & 1 ? a.data()[i] : b.data()[i]; };
  detail::elementwise_after("Select", read_mask, dst, count, pick, a, b);
}

// The elements whose bit is set, side by side; in counter mode `mask` elements of one repeat. The count comes from a
// register that the call itself reads.
template <class T>
void GatherMask(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<uint32_t>& pattern,
                const bool counter, const uint32_t mask, const GatherMaskParams& p, uint64_t& kept) {
  static_assert(sizeof(T) == 4);
  if (!counter || p.repeatTimes != 1 || p.src0BlockStride != 1) {
    ascend_sim::fail("GatherMask: the stand-in knows one repeat in counter mode");
  }
  if (!mask) ascend_sim::fail("GatherMask: counter mode takes 1 element and more");
  dst.usable("GatherMask", 0);
  src.usable("GatherMask", mask);
  pattern.usable("GatherMask", (mask + 31) / 32);
  ascend_sim::Core& core = ascend_sim::core();
  core.issue(ascend_sim::kVector, mask * sizeof(T));
  core.counters.repeats += (mask + 63) / 64;
  core.read("GatherMask", ascend_sim::kVector, src.address(), mask * sizeof(T));
  core.read("GatherMask", ascend_sim::kVector, pattern.address(), (mask + 7) / 8);
  const auto* bits = reinterpret_cast<const uint8_t*>(pattern.data());
  std::vector<T> found;
  for (uint32_t i = 0; i < mask; ++i) {
    if (bits[i / 8] >> (i % 8) & 1) found.push_back(src.data()[i]);
  }
  kept = found.size();
  if (kept > dst.GetSize()) {
    ascend_sim::fail("GatherMask: %zu elements are kept and the destination has %u", found.size(), dst.GetSize());
  }
  detail::check_overlap("GatherMask", dst.address(), kept * sizeof(T), src.address(), mask * sizeof(T));
  if (kept) core.write("GatherMask", ascend_sim::kVector, dst.address(), kept * sizeof(T));
  std::copy(found.begin(), found.end(), dst.data());
}

// dst[i] = the element `base + offset[i]` bytes into src.
template <class T>
void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<uint32_t>& offset,
            const uint32_t base, const uint32_t count) {
  src.usable("Gather", 0);
  offset.usable("Gather", count);
  const uint32_t* at = offset.data();
  const auto read_source = [&] {
    for (uint32_t i = 0; i < count; ++i) {
      const uint64_t byte = static_cast<uint64_t>(base) + at[i];
      if (byte % sizeof(T)) {
        ascend_sim::fail("Gather: byte offset %llu is no multiple of %zu", static_cast<unsigned long long>(byte),
                         sizeof(T));
      }
      if (byte + sizeof(T) > static_cast<uint64_t>(src.GetSize()) * sizeof(T)) {
        ascend_sim::fail("Gather: byte offset %llu lies beyond the source's %zu", static_cast<unsigned long long>(byte),
                         src.GetSize() * sizeof(T));
      }
      ascend_sim::core().read("Gather", ascend_sim::kVector, src.address() + static_cast<uint32_t>(byte), sizeof(T));
    }
  };
  detail::elementwise_after(
      "Gather", read_source, dst, count, [&](int64_t i) { return src.data()[(base + at[i]) / sizeof(T)]; }, offset);
}

}  // namespace AscendC
