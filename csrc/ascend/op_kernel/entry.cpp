// The kernels' entry points, for vector cores only. Arguments are pointers into global memory and numbers by value.
#include "restricted_fwd.h"

namespace ours = megatron_replay::ascend;

#define RESTRICTED_FWD(NAME, T)                                                                                                              \
  extern "C" __global__ __aicore__ void NAME(GM_ADDR hidden, GM_ADDR weight, GM_ADDR offsets, GM_ADDR columns, GM_ADDR gold, GM_ADDR z,       \
                                             GM_ADDR stats, GM_ADDR mixture, uint32_t positions, uint32_t width, uint32_t candidates,        \
                                             uint32_t vocab, uint32_t mix, uint32_t rows, uint32_t outs) {                                   \
    ours::restricted_fwd<T>(hidden, weight, offsets, columns, gold, z, stats, mixture, positions, width, candidates, vocab, mix, rows, outs); \
  }
RESTRICTED_FWD(restricted_fwd_f32, float)
RESTRICTED_FWD(restricted_fwd_bf16, bfloat16_t)
