// The entry points of op_kernel/entry.cpp as the host sees them.
#pragma once

#include <cstdint>

extern "C" {

#define ENTRY(NAME)                                                                                                                  \
  void NAME(uint8_t* hidden, uint8_t* weight, uint8_t* offsets, uint8_t* columns, uint8_t* gold, uint8_t* z, uint8_t* stats, uint8_t* mixture, \
            uint32_t positions, uint32_t width, uint32_t candidates, uint32_t vocab, uint32_t mix, uint32_t rows, uint32_t outs);
ENTRY(restricted_fwd_f32)
ENTRY(restricted_fwd_bf16)
#undef ENTRY
}
