// Element-wise vector instructions, in their two forms: a count of elements side by side,
// or a mask, repeats and strides.
#pragma once

#include "lanes.h"

namespace AscendC {

enum class RoundMode { CAST_NONE, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC };

namespace detail {

template <class T, class F>
void unary(const char* api, const LocalTensor<T>& dst, const LocalTensor<T>& src, int64_t count, F f) {
  check_arithmetic<T>(api);
  const T* x = src.data();
  if constexpr (ascend_sim::kArithmetic<T>) {
    elementwise(api, dst, count, [&](int64_t i) { return static_cast<T>(f(x[i])); }, src);
  }
}

template <class T, class F>
void binary(const char* api, const LocalTensor<T>& dst, const LocalTensor<T>& a, const LocalTensor<T>& b, int64_t count,
            F f) {
  check_arithmetic<T>(api);
  const T *x = a.data(), *y = b.data();
  if constexpr (ascend_sim::kArithmetic<T>) {
    elementwise(api, dst, count, [&](int64_t i) { return static_cast<T>(f(x[i], y[i])); }, a, b);
  }
}

template <class T, class F>
void binary(const char* api, const LocalTensor<T>& dst, const LocalTensor<T>& a, const LocalTensor<T>& b,
            uint64_t lanes, uint8_t repeats, const BinaryRepeatParams& p, F f) {
  check_arithmetic<T>(api);
  dst.usable(api, 0);
  a.usable(api, 0);
  b.usable(api, 0);
  const Operand src[] = {operand(a, p.src0BlkStride, p.src0RepStride), operand(b, p.src1BlkStride, p.src1RepStride)};
  if constexpr (ascend_sim::kArithmetic<T>) {
    strided<T>(api, first_lanes<T>(api, lanes), repeats, operand(dst, p.dstBlkStride, p.dstRepStride), src,
               [&](const T* const(&from)[2], uint32_t i) { return static_cast<T>(f(from[0][i], from[1][i])); });
  }
}

}  // namespace detail

#define ASCEND_SIM_BINARY(NAME, EXPRESSION)                                                                            \
  template <class T>                                                                                                   \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, const int32_t& count) { \
    detail::binary(#NAME, dst, src0, src1, count, [](auto x, auto y) { return EXPRESSION; });                          \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, uint64_t mask,          \
            const uint8_t repeats, const BinaryRepeatParams& params) {                                                 \
    detail::binary(#NAME, dst, src0, src1, mask, repeats, params, [](auto x, auto y) { return EXPRESSION; });          \
  }
ASCEND_SIM_BINARY(Add, x + y)
ASCEND_SIM_BINARY(Sub, x - y)
ASCEND_SIM_BINARY(Mul, x * y)
ASCEND_SIM_BINARY(Div, x / y)
ASCEND_SIM_BINARY(Max, x > y ? x : y)
ASCEND_SIM_BINARY(Min, x < y ? x : y)
#undef ASCEND_SIM_BINARY

#define ASCEND_SIM_UNARY(NAME, EXPRESSION)                                                \
  template <class T>                                                                      \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count) { \
    detail::unary(#NAME, dst, src, count, [](auto x) { return EXPRESSION; });             \
  }
ASCEND_SIM_UNARY(Exp, std::exp(x))
ASCEND_SIM_UNARY(Abs, std::fabs(x))
ASCEND_SIM_UNARY(Sqrt, std::sqrt(x))
#undef ASCEND_SIM_UNARY

#define ASCEND_SIM_SCALAR(NAME, EXPRESSION)                                                               \
  template <class T>                                                                                      \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& s, const int32_t& count) {     \
    detail::unary(#NAME, dst, src, count, [&](auto x) { return EXPRESSION; });                            \
  }
ASCEND_SIM_SCALAR(Adds, x + s)
ASCEND_SIM_SCALAR(Muls, x * s)
ASCEND_SIM_SCALAR(Maxs, x > s ? x : s)
ASCEND_SIM_SCALAR(Mins, x < s ? x : s)
#undef ASCEND_SIM_SCALAR

// With a mask bit for each lane.
template <class T>
void Adds(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& s, uint64_t mask[], const uint8_t repeats,
          const UnaryRepeatParams& p) {
  detail::check_arithmetic<T>("Adds");
  dst.usable("Adds", 0);
  src.usable("Adds", 0);
  const detail::Operand from[] = {detail::operand(src, p.srcBlkStride, p.srcRepStride)};
  detail::strided<T>("Adds", {{mask[0], mask[1]}}, repeats, detail::operand(dst, p.dstBlkStride, p.dstRepStride), from,
                     [&](const T* const(&x)[1], uint32_t i) { return x[0][i] + s; });
}

// dst += src0 * src1; the product is taken to be rounded before it is added, which the public text leaves open.
template <class T>
void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
               const int32_t& count) {
  detail::check_arithmetic<T>("MulAddDst");
  const T *x = src0.data(), *y = src1.data(), *d = dst.data();
  detail::elementwise("MulAddDst", dst, count, [&](int64_t i) { return d[i] + x[i] * y[i]; }, src0, src1, dst);
}

template <class T>
void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, uint64_t mask,
               const uint8_t repeats, const BinaryRepeatParams& p) {
  detail::check_arithmetic<T>("MulAddDst");
  dst.usable("MulAddDst", 0);
  src0.usable("MulAddDst", 0);
  src1.usable("MulAddDst", 0);
  const detail::Operand to = detail::operand(dst, p.dstBlkStride, p.dstRepStride);
  const detail::Operand src[] = {detail::operand(src0, p.src0BlkStride, p.src0RepStride),
                                 detail::operand(src1, p.src1BlkStride, p.src1RepStride), to};
  detail::strided<T>("MulAddDst", detail::first_lanes<T>("MulAddDst", mask), repeats, to, src,
                     [](const T* const(&x)[3], uint32_t i) { return x[2][i] + x[0][i] * x[1][i]; });
}

template <class T>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& s, const int32_t& count) {
  detail::check_arithmetic<T>("Axpy");
  const T *x = src.data(), *d = dst.data();
  detail::elementwise("Axpy", dst, count, [&](int64_t i) { return d[i] + x[i] * s; }, src, dst);
}

#define ASCEND_SIM_BITS(NAME, OPERATOR)                                                                                \
  template <class T>                                                                                                   \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, const int32_t& count) { \
    static_assert(std::is_same_v<T, uint16_t> || std::is_same_v<T, int16_t>, #NAME " takes 16-bit integers");          \
    const T *x = src0.data(), *y = src1.data();                                                                        \
    detail::elementwise(#NAME, dst, count, [&](int64_t i) { return static_cast<T>(x[i] OPERATOR y[i]); }, src0, src1); \
  }
ASCEND_SIM_BITS(And, &)
ASCEND_SIM_BITS(Or, |)
#undef ASCEND_SIM_BITS

template <class T>
void Duplicate(const LocalTensor<T>& dst, const T& value, const int32_t& count) {
  const T kept = value;
  detail::elementwise("Duplicate", dst, count, [&](int64_t) { return kept; });
}

template <class T>
void Duplicate(const LocalTensor<T>& dst, const T& value, uint64_t mask[], const uint8_t repeats,
               const uint16_t block_stride, const uint8_t repeat_stride) {
  dst.usable("Duplicate", 0);
  const detail::Operand none[] = {detail::operand(dst, block_stride, repeat_stride)};
  detail::check_repeats("Duplicate", repeats);
  ascend_sim::Core& core = ascend_sim::core();
  core.issue(ascend_sim::kVector, repeats * ascend_sim::kRepeatBytes);
  core.counters.repeats += repeats;
  constexpr uint32_t kPerBlock = ascend_sim::kBlockBytes / sizeof(T);
  const detail::Mask lanes{{mask[0], mask[1]}};
  for (uint32_t repeat = 0; repeat < repeats; ++repeat) {
    for (uint32_t lane = 0; lane < 8 * kPerBlock; ++lane) {
      if (!lanes.has(lane)) continue;
      const uint32_t at =
          detail::block_of("Duplicate", none[0], repeat, lane / kPerBlock) + lane % kPerBlock * sizeof(T);
      core.write("Duplicate", ascend_sim::kVector, at, sizeof(T));
      std::memcpy(core.at(at), &value, sizeof(T));
    }
  }
}

template <class D, class S>
void Cast(const LocalTensor<D>& dst, const LocalTensor<S>& src, const RoundMode& mode, const uint32_t count) {
  if (sizeof(D) < sizeof(S) && mode == RoundMode::CAST_NONE) {
    ascend_sim::fail("Cast: to a narrower type it needs a rounding mode");
  }
  if (sizeof(D) > sizeof(S) && mode != RoundMode::CAST_NONE) {
    ascend_sim::fail("Cast: to a wider type it takes CAST_NONE only");
  }
  if (mode > RoundMode::CAST_RINT) ascend_sim::fail("Cast: the stand-in knows CAST_NONE and CAST_RINT");
  const S* x = src.data();
  detail::elementwise("Cast", dst, count, [&](int64_t i) { return ascend_sim::convert<D>(x[i]); }, src);
}

template <class T>
void CreateVecIndex(const LocalTensor<T>& dst, const T& first, uint32_t count) {
  detail::elementwise("CreateVecIndex", dst, count, [&](int64_t i) { return static_cast<T>(first + i); });
}

}  // namespace AscendC
