// Element types of the device and their conversions to float, which is exact, and back, which
// rounds to the nearest, ties to even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

struct bfloat16_t {
  uint16_t bits;
};

namespace ascend_sim {

// bfloat16 has none on architecture 2201
template <class T>
constexpr bool kArithmetic = std::is_same_v<T, float> || std::is_same_v<T, int32_t>;

template <class To, class From>
To convert(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_same_v<From, bfloat16_t>) {
    static_assert(std::is_same_v<To, float>);
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
  } else if constexpr (std::is_same_v<To, bfloat16_t>) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
  } else {
    return static_cast<To>(std::nearbyint(x));
  }
}

}  // namespace ascend_sim
