// The tilings: the part of a problem that fits the unified buffer of a vector core at a time. Plain C++, the same on
// a device and on the host stand-in.
#pragma once

#include <cstdint>

#include "launch.h"

namespace megatron_replay::ascend {

constexpr uint32_t kBufferBytes = 196608;  // of one vector core, architecture 2201
constexpr uint32_t kMaxWidth = 8192;
constexpr uint32_t kWidthUnit = 16;  // a row of bfloat16 is then a multiple of 32 bytes

constexpr uint32_t bytes_of(Element element) { return element == Element::kFloat32 ? 4 : 2; }

// Throws std::invalid_argument unless the width is a multiple of 16 up to 8,192.
void check_width(uint32_t width);

// Throws std::invalid_argument unless the rows begin at a multiple of 32 bytes, as every tensor of its own does.
void check_start(const void* rows, const char* name);

// rows: weight rows of a tile, at most 15 (so that no reduction takes more than 255 repeats); outs: buffers for
// rows of each mixture, two where they fit; bytes: of the unified buffer. The same with and without a mixture, so
// that both sum in the same order. With targets (`soft`), rows of float32 are at most 7,680 wide.
struct FwdTiling {
  uint32_t rows, outs, bytes;
};
FwdTiling fwd_tiling(Element element, uint32_t width, bool soft);

// rows: hidden states of a tile, at most 16; outs: buffers for sums.
struct DwTiling {
  uint32_t rows, outs, bytes;
};
DwTiling dw_tiling(Element element, Element grad_element, uint32_t width, bool add);

}  // namespace megatron_replay::ascend
