// The walk of the loss's kernels over ragged lists, and the overlap of tiles in every kernel that cuts its work so.
#pragma once

#include "tables.h"

namespace megatron_replay::ascend {

struct ListTile {
  uint32_t token, count;
  uint64_t first;      // candidate
  bool opens, closes;  // the position
};

// The candidates of the positions that this block takes, in tiles of one position; a position without
// candidates has one empty tile.
class ListTiles {
 public:
  __aicore__ inline void Init(TPipe& pipe, GM_ADDR offsets, uint32_t positions, uint32_t candidates, uint32_t size) {
    size_ = size;
    range_ = ListsOfBlock<int64_t>(offsets, positions, candidates);
    offsets_.Init(pipe, offsets, static_cast<uint64_t>(positions) + 1);
    offsets_.Clip(static_cast<uint64_t>(range_.last) + 1);
    token_ = range_.first;
  }

  // One behind this block's last position.
  __aicore__ inline uint32_t Last() { return range_.last; }

  __aicore__ inline bool More() { return token_ < range_.last; }

  // Before the first tile, where there is one; returns one behind this block's last candidate.
  __aicore__ inline uint64_t Begin() {
    at_ = static_cast<uint64_t>(offsets_.At(token_));
    const uint64_t last = EndOf(range_.last - 1);
    end_ = EndOf(token_);
    return last;
  }

  __aicore__ inline ListTile Take() {
    const uint32_t count = static_cast<uint32_t>(Least<uint64_t>(size_, end_ - at_));
    const ListTile tile{token_, count, at_, opens_, at_ + count == end_};
    at_ += count;
    opens_ = tile.closes;
    if (tile.closes && ++token_ < range_.last) end_ = EndOf(token_);
    return tile;
  }

 private:
  __aicore__ inline uint64_t EndOf(uint32_t token) {
    return static_cast<uint64_t>(offsets_.At(static_cast<uint64_t>(token) + 1));
  }

  Window<int64_t> offsets_;
  Range range_;
  uint64_t at_, end_;
  uint32_t size_, token_;
  bool opens_ = true;
};

// The targets of the candidates, a tile at a time. Lanes beyond the tile count for nothing.
class TargetTiles {
 public:
  __aicore__ inline void Init(TPipe& pipe, GM_ADDR targets, uint32_t candidates, uint32_t size) {
    targets_.SetGlobalBuffer((__gm__ float*)targets, candidates);
    pipe.InitBuffer(tiles_in_, 2, size * sizeof(float));
  }

  __aicore__ inline void Load(const ListTile& tile) {
    const LocalTensor<float> tensor = tiles_in_.AllocTensor<float>();
    const DataCopyExtParams stretch{1, static_cast<uint32_t>(tile.count * sizeof(float)), 0, 0, 0};
    DataCopyPad(tensor, targets_[tile.first], stretch, DataCopyPadExtParams<float>{false, 0, 0, 0.0f});
    tiles_in_.EnQue(tensor);
  }

  __aicore__ inline LocalTensor<float> Take() { return tiles_in_.DeQue<float>(); }
  __aicore__ inline void Free(LocalTensor<float>& tensor) { tiles_in_.FreeTensor(tensor); }

 private:
  GlobalTensor<float> targets_;
  TQue<TPosition::VECIN, 2> tiles_in_;
};

// Compute(tile) of every tile, while the next one's data are on their way: Load runs one tile ahead.
template <typename Tile, typename Tiles, typename Kernel>
__aicore__ inline void OneAhead(Tiles& tiles, Kernel& kernel) {
  if (!tiles.More()) return;
  Tile tile = tiles.Take();
  kernel.Load(tile);
  while (true) {
    const bool more = tiles.More();
    Tile next{};
    if (more) {
      next = tiles.Take();
      kernel.Load(next);
    }
    kernel.Compute(tile);
    if (!more) return;
    tile = next;
  }
}

}  // namespace megatron_replay::ascend
