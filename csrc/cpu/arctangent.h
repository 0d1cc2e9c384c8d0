// The arctangent of the update, made to be vectorised: no branch, no table, and the same bits in every
// lane, tail and instruction set.
#pragma once

#include <cmath>

#include "isa.h"

namespace megatron_replay {

// atan2(y, x) for x >= 0, which a root of second moments is. Error below 2 units in the last place of float32
// everywhere (the tests compare with float64; the polynomial's own relative error is 2.1e-8, and
// tools/arctangent.py derives its coefficients).
// Exact: oddness in y; atan2(+-0, x) = +-0 also for x = 0; atan2(y, 0) = +-pi/2; NaN for NaN, and for two infinities.
// Selections are kept to one, since AVX2 spends three instructions on each.
ALWAYS_INLINE float arctangent(float y, float x) {
  const float a = __builtin_fabsf(y);
  const float low = a < x ? a : x;
  const float high = a < x ? x : a;
  const float t = low / (high + (high == 0.0f ? 1.0f : 0.0f));  // 0 / 0 is to be 0
  const float z = t * t;
  // by Estrin's scheme: a chain half as long as Horner's lets the work hide behind the memory traffic
  const float z2 = z * z;
  const float z4 = z2 * z2;
  const float q01 = -0.333331525f + 0.199937731f * z;
  const float q23 = -0.142110556f + 0.106660038f * z;
  const float q45 = -0.0755221248f + 0.0432118438f * z;
  const float q67 = -0.016367916f + 0.00292068906f * z;
  const float q = (q01 + q23 * z2) + (q45 + q67 * z2) * z4;
  const float octant = t + t * (z * q);
  // the other octant: pi / 2 - octant, with pi / 2 = 1.57079637 - 4.37113883e-8, of which the second
  // part matters for small angles only
  const float rest = 1.57079637f - (octant + 4.37113883e-8f);
  const float angle = a > x ? rest : octant;
  return __builtin_copysignf(angle, y);
}

}  // namespace megatron_replay
