// The cuts of a flat tensor for the optimizer's kernels: chunks of kChunk elements, and tiles of a chunk, as much as
// the buffer holds. The sums of each chunk are written for themselves, so that no result depends on the number of
// blocks.
#pragma once

#include "rows.h"
#include "tiles.h"

namespace megatron_replay::ascend {

constexpr uint32_t kChunk = 65536;
constexpr uint32_t kPartials = kBlock;  // numbers a chunk leaves

struct FlatTile {
  uint64_t first;
  uint32_t count, chunk;
  bool opens, closes;  // the chunk
};

class FlatTiles {
 public:
  __aicore__ inline void Init(uint64_t length, uint32_t tile) {
    length_ = length;
    tile_ = tile;
    range_ = ShareOfBlock((length + kChunk - 1) / kChunk);
    at_ = static_cast<uint64_t>(range_.first) * kChunk;
    end_ = Least<uint64_t>(static_cast<uint64_t>(range_.last) * kChunk, length);
  }

  __aicore__ inline bool More() { return at_ < end_; }

  __aicore__ inline FlatTile Take() {
    const uint32_t chunk = static_cast<uint32_t>(at_ / kChunk);
    const uint64_t chunk_end = Least<uint64_t>(static_cast<uint64_t>(chunk + 1) * kChunk, length_);
    const uint32_t count = static_cast<uint32_t>(Least<uint64_t>(tile_, chunk_end - at_));
    const FlatTile tile{at_, count, chunk, at_ % kChunk == 0, at_ + count == chunk_end};
    at_ += count;
    return tile;
  }

 private:
  uint64_t length_, at_, end_;
  uint32_t tile_;
  Range range_;
};

// Moves `count` elements, however many, between a flat tensor and the buffer.
template <typename T>
__aicore__ inline void FetchFlat(const LocalTensor<T>& target, const GlobalTensor<T>& source, uint32_t count) {
  DataCopyPad(target, source, DataCopyExtParams{1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0},
              DataCopyPadExtParams<T>{false, 0, 0, T{}});
}

template <typename T>
__aicore__ inline void SendFlat(const GlobalTensor<T>& target, const LocalTensor<T>& source, uint32_t count) {
  DataCopyPad(target, source, DataCopyExtParams{1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0});
}

}  // namespace megatron_replay::ascend
