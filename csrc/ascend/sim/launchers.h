// The launchers of op_host/launch.h on the stand-in, for a given kernel function: what the arguments are, and how large.
#pragma once

#include "../op_host/tiling.h"
#include "run.h"

namespace ascend_sim {

using megatron_replay::ascend::bytes_of;
using megatron_replay::ascend::Element;

inline uint8_t* gm(const void* pointer) { return static_cast<uint8_t*>(const_cast<void*>(pointer)); }

template <class Kernel>
void run_restricted_fwd(Kernel kernel, uint32_t blocks, Element element, const void* hidden, const void* weight, const void* offsets,
                        const void* columns, const void* gold, void* z, void* stats, void* mixture, uint32_t positions, uint32_t width,
                        uint32_t candidates, uint32_t vocab) {
  const auto tiling = megatron_replay::ascend::fwd_tiling(element, width);
  const uint64_t n = positions, h = width, size = bytes_of(element);
  run(blocks,
      {{hidden, n * h * size, false},
       {weight, vocab * h * size, false},
       {offsets, (n + 1) * 8, false},
       {columns, candidates * 4ull, false},
       {gold, n * 8, false},
       {z, candidates * 4ull, true},
       {stats, n * 12, true},
       {mixture, n * h * 4, true}},
      [&] {
        kernel(gm(hidden), gm(weight), gm(offsets), gm(columns), gm(gold), gm(z), gm(stats), gm(mixture), positions, width, candidates, vocab,
               mixture != nullptr, tiling.rows, tiling.outs);
      });
}

}  // namespace ascend_sim
