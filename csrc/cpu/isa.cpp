#include "isa.h"

#include <atomic>

namespace megatron_replay {
namespace {

const char* const kNames[] = {"baseline", "avx2", "avx512"};

bool has(Isa isa) {
  if (isa == Isa::baseline) return true;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2");
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> value{has(Isa::avx512) ? Isa::avx512 : has(Isa::avx2) ? Isa::avx2 : Isa::baseline};
  return value;
}

}  // namespace

Isa isa() { return chosen().load(std::memory_order_relaxed); }

std::string isa_name() { return kNames[static_cast<int>(isa())]; }

bool use_isa(const std::string& name) {
  for (int i = 0; i < 3; ++i) {
    if (name == kNames[i] && has(static_cast<Isa>(i))) {
      chosen().store(static_cast<Isa>(i), std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace megatron_replay
