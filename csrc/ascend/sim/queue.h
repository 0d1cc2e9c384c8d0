// TPipe, TQue and TBuf. A queue carries its buffers between two pipes and makes each wait for the other: EnQue and
// DeQue hand a filled buffer on, FreeTensor and AllocTensor an empty one back.
#pragma once

#include <exception>
#include <vector>

#include "sync.h"
#include "tensor.h"

namespace AscendC {

template <TPosition position>
class TBuf {
 public:
  template <class T>
  LocalTensor<T> Get() const {
    if (!bytes_) ascend_sim::fail("TBuf.Get: InitBuffer was not called");
    return {address_, static_cast<uint32_t>(bytes_ / sizeof(T)), position, -1, 0};
  }

 private:
  friend class TPipe;
  uint32_t address_ = 0, bytes_ = 0;
};

template <TPosition position, int32_t depth>
class TQue {
  static_assert(position == TPosition::VECIN || position == TPosition::VECOUT);
  static constexpr ascend_sim::Pipe kProducer = position == TPosition::VECIN ? ascend_sim::kMte2 : ascend_sim::kVector;
  static constexpr ascend_sim::Pipe kConsumer = position == TPosition::VECIN ? ascend_sim::kVector : ascend_sim::kMte3;

 public:
  template <class T>
  LocalTensor<T> AllocTensor() {
    for (uint32_t i = 0; i < buffers_.size(); ++i) {
      Buffer& buffer = buffers_[i];
      if (buffer.state != kFree) continue;
      buffer.state = kAllocated;
      ascend_sim::core().live(static_cast<int>(position), 1);
      ascend_sim::core().learn(kProducer, buffer.handed);
      ascend_sim::core().poison(buffer.address, bytes_);
      return tensor<T>(i);
    }
    ascend_sim::fail("AllocTensor: all %zu buffers of the queue are in use, so the core hangs", buffers_.size());
  }

  template <class T>
  bool EnQue(const LocalTensor<T>& filled) {
    Buffer& buffer = owned("EnQue", filled);
    if (buffer.state != kAllocated) {
      ascend_sim::fail("EnQue: the tensor was not allocated from this queue, or is in it already");
    }
    if (waiting_.size() >= static_cast<size_t>(depth)) ascend_sim::fail("EnQue: the queue of depth %d is full", depth);
    buffer.state = kQueued;
    buffer.handed = ascend_sim::core().now(kProducer);
    ++ascend_sim::core().generations[filled.slot()];
    waiting_.push_back(filled.slot() - first_);
    return true;
  }

  template <class T>
  LocalTensor<T> DeQue() {
    if (waiting_.empty()) ascend_sim::fail("DeQue: the queue is empty");
    const uint32_t i = waiting_.front();
    waiting_.erase(waiting_.begin());
    buffers_[i].state = kTaken;
    ascend_sim::core().learn(kConsumer, buffers_[i].handed);
    return tensor<T>(i);
  }

  template <class T>
  void FreeTensor(LocalTensor<T>& done) {
    Buffer& buffer = owned("FreeTensor", done);
    if (buffer.state != kTaken) ascend_sim::fail("FreeTensor: a tensor that did not come out of this queue");
    buffer.state = kFree;
    buffer.handed = ascend_sim::core().now(kConsumer);
    ++ascend_sim::core().generations[done.slot()];
    ascend_sim::core().live(static_cast<int>(position), -1);
  }

  ~TQue() noexcept(false) {
    if (std::uncaught_exceptions()) return;
    for (const Buffer& buffer : buffers_) {
      if (buffer.state != kFree) ascend_sim::fail("the kernel ended with a tensor of a queue not freed");
    }
  }

 private:
  friend class TPipe;
  enum State { kFree, kAllocated, kQueued, kTaken };
  struct Buffer {
    uint32_t address;
    State state = kFree;
    ascend_sim::Clock handed{};
  };

  template <class T>
  LocalTensor<T> tensor(uint32_t i) const {
    const auto slot = static_cast<int32_t>(first_ + i);
    return {buffers_[i].address, static_cast<uint32_t>(bytes_ / sizeof(T)), position, slot,
            ascend_sim::core().generations[slot]};
  }

  template <class T>
  Buffer& owned(const char* api, const LocalTensor<T>& tensor) {
    const int64_t i = static_cast<int64_t>(tensor.slot()) - first_;
    if (tensor.slot() < 0 || i < 0 || i >= static_cast<int64_t>(buffers_.size())) {
      ascend_sim::fail("%s: a tensor of another queue", api);
    }
    if (ascend_sim::core().generations[tensor.slot()] != tensor.generation()) {
      ascend_sim::fail("%s: a stale tensor: its buffer was enqueued or freed since", api);
    }
    return buffers_[i];
  }

  std::vector<Buffer> buffers_;
  std::vector<uint32_t> waiting_;
  uint32_t bytes_ = 0;
  int32_t first_ = 0;
};

class TPipe {
 public:
  template <TPosition position, int32_t depth>
  bool InitBuffer(TQue<position, depth>& queue, uint8_t num, uint32_t bytes) {
    if (!bytes || !num) ascend_sim::fail("InitBuffer: %u buffers of %u bytes", num, bytes);
    const uint32_t address = ascend_sim::core().allocate(num, bytes);
    queue.bytes_ = (bytes + ascend_sim::kBlockBytes - 1) / ascend_sim::kBlockBytes * ascend_sim::kBlockBytes;
    queue.first_ = static_cast<int32_t>(ascend_sim::core().generations.size());
    ascend_sim::core().generations.resize(queue.first_ + num, 0);
    for (uint32_t i = 0; i < num; ++i) queue.buffers_.push_back({address + i * queue.bytes_});
    return true;
  }

  template <TPosition position>
  bool InitBuffer(TBuf<position>& buffer, uint32_t bytes) {
    if (!bytes) ascend_sim::fail("InitBuffer: a buffer of no bytes");
    buffer.address_ = ascend_sim::core().allocate(1, bytes);
    buffer.bytes_ = (bytes + ascend_sim::kBlockBytes - 1) / ascend_sim::kBlockBytes * ascend_sim::kBlockBytes;
    return true;
  }

  template <HardEvent event>
  TEventID AllocEventID() {
    const int kind = static_cast<int>(event);
    for (TEventID id = 0; id < ascend_sim::kMaxEvents; ++id) {
      if (!(taken_[kind] >> id & 1)) {
        taken_[kind] |= 1u << id;
        return id;
      }
    }
    ascend_sim::fail("AllocEventID: all %d events of this kind are taken", ascend_sim::kMaxEvents);
  }

  template <HardEvent event>
  void ReleaseEventID(TEventID id) {
    taken_[static_cast<int>(event)] &= ~(1u << id);
  }

 private:
  uint32_t taken_[16] = {};
};

}  // namespace AscendC
