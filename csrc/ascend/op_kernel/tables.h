// Tables in global memory that the scalar pipe reads: in stretches through the unified buffer, or single entries
// directly.
#pragma once

#include "kernel_operator.h"

namespace megatron_replay::ascend {

using namespace AscendC;

constexpr uint32_t kWindow = 256;  // entries

template <typename T>
__aicore__ inline T Least(T a, T b) {
  return a < b ? a : b;
}

// A table that is read once and roughly in order, a stretch of kWindow entries at a time. It moves words of 32 bits,
// which every DataCopyPad takes.
template <typename T>
class Window {
 public:
  __aicore__ inline void Init(TPipe& pipe, GM_ADDR table, uint64_t length) {
    words_.SetGlobalBuffer((__gm__ uint32_t*)table, length * kWords);
    pipe.InitBuffer(buffer_, kWindow * sizeof(T));
    filled_ = pipe.AllocEventID<HardEvent::MTE2_S>();
    emptied_ = pipe.AllocEventID<HardEvent::S_MTE2>();
    end_ = length;
    start_ = 0;
    stop_ = 0;
  }

  // Nothing from `end` on will be asked for.
  __aicore__ inline void Clip(uint64_t end) { end_ = end; }

  __aicore__ inline T At(uint64_t i) {
    if (i < start_ || i >= stop_) Load(i);
    return buffer_.template Get<T>().GetValue(static_cast<uint32_t>(i - start_));
  }

 private:
  static constexpr uint32_t kWords = sizeof(T) / sizeof(uint32_t);

  __aicore__ inline void Load(uint64_t i) {
    const uint32_t count = static_cast<uint32_t>(Least<uint64_t>(kWindow, end_ - i));
    SetFlag<HardEvent::S_MTE2>(emptied_);
    WaitFlag<HardEvent::S_MTE2>(emptied_);
    const DataCopyExtParams stretch{1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0};
    const DataCopyPadExtParams<uint32_t> unpadded{false, 0, 0, 0};
    DataCopyPad(buffer_.template Get<uint32_t>(), words_[i * kWords], stretch, unpadded);
    SetFlag<HardEvent::MTE2_S>(filled_);
    WaitFlag<HardEvent::MTE2_S>(filled_);
    start_ = i;
    stop_ = i + count;
  }

  GlobalTensor<uint32_t> words_;
  TBuf<TPosition::VECIN> buffer_;
  TEventID filled_, emptied_;
  uint64_t start_, stop_, end_;
};

struct Range {
  uint32_t first, last;  // first <= i < last
};

// The lists of a ragged table that this block takes. The work of a list is its length and one more, so list t begins at
// offsets[t] + t. Every block takes the lists that begin within its part of the work. So the parts are equal up to one
// list, and the host need not look at the offsets.
template <typename T>
__aicore__ inline uint32_t FirstFrom(GlobalTensor<T>& offsets, uint32_t lists, uint64_t work) {
  uint32_t low = 0, high = lists;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (static_cast<uint64_t>(offsets.GetValue(middle)) + middle >= work) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

template <typename T>
__aicore__ inline Range ListsOfBlock(GM_ADDR table, uint32_t lists, uint64_t entries) {
  GlobalTensor<T> offsets;
  offsets.SetGlobalBuffer((__gm__ T*)table, static_cast<uint64_t>(lists) + 1);
  const uint64_t work = entries + lists, block = GetBlockIdx(), blocks = GetBlockNum();
  return {FirstFrom(offsets, lists, work * block / blocks), FirstFrom(offsets, lists, work * (block + 1) / blocks)};
}

// The equal part of this block, for work whose items all cost the same.
__aicore__ inline Range ShareOfBlock(uint64_t count) {
  const uint64_t block = GetBlockIdx(), blocks = GetBlockNum();
  return {static_cast<uint32_t>(count * block / blocks), static_cast<uint32_t>(count * (block + 1) / blocks)};
}

}  // namespace megatron_replay::ascend
