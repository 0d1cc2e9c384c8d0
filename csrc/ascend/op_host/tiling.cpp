#include "tiling.h"

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace megatron_replay::ascend {
namespace {

constexpr uint32_t kAlignment = 32;     // bytes
constexpr uint32_t kWindow = 256;       // entries of a table in the buffer: tables.h
constexpr uint32_t kMaxRows = 15;       // 15 x 16 repeats of a reduction
constexpr uint32_t kMaxHidden = 16;
constexpr uint32_t kPart = 64;          // entries that are summed as one: restricted_bwd_dw.h
constexpr uint64_t kChunk = 65536;      // elements whose sums are written as one: chunks.h
constexpr uint32_t kMaxK = 2048;
constexpr uint32_t kStateBytes = 960;   // softmax_state.h: two states of 96 bytes and the scratch
constexpr uint32_t kTileBytes = 512;    // two buffers for the logits of a tile, or its targets

constexpr uint32_t rounded_up(uint32_t x, uint32_t unit) { return (x + unit - 1) / unit * unit; }

uint32_t fwd_bytes(Element element, uint32_t width, bool soft, uint32_t rows, uint32_t outs) {
  const uint32_t raw = width * bytes_of(element), wide = width * 4, fold = std::min(1024u, rounded_up(width, 512));
  uint32_t bytes = raw + wide + 2 * rows * raw;
  if (element != Element::kFloat32) bytes += rows * wide;
  bytes += rows * fold * 4 + rounded_up(rows * fold / 64 * 4, 32);
  bytes += outs * wide + 512;
  if (soft) bytes += outs * wide + 512 + kTileBytes;
  return bytes + kWindow * (8 + 4 + 8) + kStateBytes + kTileBytes;
}

uint32_t dw_bytes(Element element, Element grad_element, uint32_t width, bool add, uint32_t rows, uint32_t outs) {
  const uint32_t raw = width * bytes_of(element), wide = width * 4, grad = width * bytes_of(grad_element);
  uint32_t bytes = 2 * rows * raw + outs * wide + 4 * kWindow * 4;
  if (element != Element::kFloat32) bytes += rows * wide;
  if (add) bytes += 2 * grad;
  if (grad_element != Element::kFloat32) bytes += grad + wide;
  return bytes;
}

}  // namespace

void check_width(uint32_t width) {
  if (width == 0 || width % kWidthUnit || width > kMaxWidth) {
    throw std::invalid_argument("the Ascend kernels take a hidden size that is a multiple of 16 up to 8192, not " +
                                std::to_string(width));
  }
}

void check_start(const void* rows, const char* name) {
  if (reinterpret_cast<uintptr_t>(rows) % kAlignment) {
    throw std::invalid_argument(
        std::string("the Ascend kernels take rows that begin at a multiple of 32 bytes; clone ") + name);
  }
}

FwdTiling fwd_tiling(Element element, uint32_t width, bool soft) {
  check_width(width);
  for (const uint32_t outs : {2u, 1u}) {
    for (uint32_t rows = kMaxRows; rows >= 1; --rows) {
      const uint32_t bytes = fwd_bytes(element, width, soft, rows, outs);
      if (bytes <= kBufferBytes) return {rows, outs, bytes};
    }
  }
  throw std::invalid_argument("with targets the Ascend kernel takes no float32 rows of " + std::to_string(width) +
                              "; use bfloat16 or kernels=reference");
}

DwTiling dw_tiling(Element element, Element grad_element, uint32_t width, bool add) {
  check_width(width);
  for (const uint32_t outs : {2u, 1u}) {
    for (uint32_t rows = kMaxHidden; rows >= 1; --rows) {
      const uint32_t bytes = dw_bytes(element, grad_element, width, add, rows, outs);
      if (bytes <= kBufferBytes) return {rows, outs, bytes};
    }
  }
  throw std::logic_error("no row of " + std::to_string(width) + " fits the unified buffer");
}

uint32_t restricted_bwd_dw_parts(uint32_t entries) { return 2 * ((entries + kPart - 1) / kPart); }

uint64_t moclip_chunks(uint64_t length) { return (length + kChunk - 1) / kChunk; }

uint32_t topk_capacity(uint32_t k) {
  if (k == 0 || k > kMaxK) {
    throw std::invalid_argument("the Ascend kernel selects 1 to 2048 of a row, not " + std::to_string(k));
  }
  return rounded_up(std::max(2 * k, 512u), 64);
}

}  // namespace megatron_replay::ascend
