// One source, compiled for several instruction sets, of which the best that the processor has is taken at run time.
//
// PER_ISA(run, (int n, float* x), (n, x)) makes `run` out of an inline function `run_body`: a table of functions, one
// an instruction set. All of them give the same bits: no fused multiply-add (setup.py says -ffp-contract=off), no
// reassociation, only IEEE operations.
// Other processors than x86-64 have one entry, compiled for the baseline (on aarch64 that includes NEON).
#pragma once

#include <string>

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace megatron_replay {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

// The instruction set in use, and its name: "baseline", "avx2" or "avx512".
Isa isa();
std::string isa_name();
// Take another one (the tests compare them); false where it is unknown or the processor lacks it.
bool use_isa(const std::string& name);

}  // namespace megatron_replay

// PER_WIDTH(run, (class A), (A), (int n, A* x), (n, x)) does the same for a body that is a template over the bytes of a
// vector and over types, run_body<kBytes, A>, and makes a table for each choice of types: run<float>[level](n, x).
#define UNWRAP(...) __VA_ARGS__
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FOR_AVX2 __attribute__((target("avx2")))
#define FOR_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define PER_WIDTH(name, types, names, parameters, arguments) \
  template <UNWRAP types>                                    \
  static void name##_baseline parameters {                   \
    name##_body<16, UNWRAP names> arguments;                 \
  }                                                          \
  template <UNWRAP types>                                    \
  FOR_AVX2 static void name##_avx2 parameters {              \
    name##_body<32, UNWRAP names> arguments;                 \
  }                                                          \
  template <UNWRAP types>                                    \
  FOR_AVX512 static void name##_avx512 parameters {          \
    name##_body<64, UNWRAP names> arguments;                 \
  }                                                          \
  template <UNWRAP types>                                    \
  static void(*const name[])                                 \
      parameters = {name##_baseline<UNWRAP names>, name##_avx2<UNWRAP names>, name##_avx512<UNWRAP names>}
#define PER_ISA(name, parameters, arguments)                                        \
  static void name##_baseline parameters { name##_body arguments; }                 \
  FOR_AVX2 static void name##_avx2 parameters { name##_body arguments; }            \
  FOR_AVX512 static void name##_avx512 parameters { name##_body arguments; }        \
  static void(*const name[]) parameters = {name##_baseline, name##_avx2, name##_avx512}
#else
#define PER_WIDTH(name, types, names, parameters, arguments) \
  template <UNWRAP types>                                    \
  static void name##_baseline parameters {                   \
    name##_body<16, UNWRAP names> arguments;                 \
  }                                                          \
  template <UNWRAP types>                                    \
  static void(*const name[])                                 \
      parameters = {name##_baseline<UNWRAP names>, name##_baseline<UNWRAP names>, name##_baseline<UNWRAP names>}
#define PER_ISA(name, parameters, arguments)                        \
  static void name##_baseline parameters { name##_body arguments; } \
  static void(*const name[]) parameters = {name##_baseline, name##_baseline, name##_baseline}
#endif
