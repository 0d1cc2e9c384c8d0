// Flags between pipes and barriers within one.
#pragma once

#include "core.h"

enum pipe_t { PIPE_S, PIPE_V, PIPE_MTE2, PIPE_MTE3, PIPE_ALL };

namespace AscendC {

using TEventID = int8_t;

enum class HardEvent : uint8_t {
  MTE2_V,
  V_MTE2,
  MTE3_V,
  V_MTE3,
  MTE3_MTE2,
  MTE2_MTE3,
  S_V,
  V_S,
  S_MTE2,
  MTE2_S,
  S_MTE3,
  MTE3_S
};

constexpr ascend_sim::Pipe kFrom[] = {ascend_sim::kMte2,   ascend_sim::kVector, ascend_sim::kMte3,
                                      ascend_sim::kVector, ascend_sim::kMte3,   ascend_sim::kMte2,
                                      ascend_sim::kScalar, ascend_sim::kVector, ascend_sim::kScalar,
                                      ascend_sim::kMte2,   ascend_sim::kScalar, ascend_sim::kMte3};
constexpr ascend_sim::Pipe kTo[] = {ascend_sim::kVector, ascend_sim::kMte2,   ascend_sim::kVector, ascend_sim::kMte3,
                                    ascend_sim::kMte2,   ascend_sim::kMte3,   ascend_sim::kVector, ascend_sim::kScalar,
                                    ascend_sim::kMte2,   ascend_sim::kScalar, ascend_sim::kMte3,   ascend_sim::kScalar};

template <HardEvent event>
void SetFlag(int32_t id) {
  ascend_sim::core().set_flag(kFrom[static_cast<int>(event)], kTo[static_cast<int>(event)], id);
}

template <HardEvent event>
void WaitFlag(int32_t id) {
  ascend_sim::core().wait_flag(kFrom[static_cast<int>(event)], kTo[static_cast<int>(event)], id);
}

template <pipe_t pipe>
void PipeBarrier() {
  static_assert(pipe != PIPE_S, "the hardware keeps the scalar pipe in order; PipeBarrier does not take it");
  if constexpr (pipe == PIPE_ALL) {
    ascend_sim::core().barrier_all();
  } else {
    ascend_sim::core().barrier(static_cast<ascend_sim::Pipe>(pipe));
  }
}

inline int64_t GetBlockIdx() { return ascend_sim::core().block; }
inline int64_t GetBlockNum() { return ascend_sim::core().num_blocks; }

}  // namespace AscendC
