// LocalTensor and GlobalTensor: handles that are checked whenever they are used.
#pragma once

#include "core.h"
#include "global.h"
#include "types.h"

namespace AscendC {

enum class TPosition : uint8_t { GM, VECIN, VECOUT, VECCALC };
using QuePosition = TPosition;

template <class T>
class LocalTensor {
 public:
  LocalTensor() = default;
  LocalTensor(uint32_t address, uint32_t length, TPosition position, int32_t slot, uint32_t generation)
      : address_(address), length_(length), position_(position), slot_(slot), generation_(generation) {}

  uint32_t GetSize() const { return length_; }

  LocalTensor operator[](uint32_t offset) const {
    if (offset > length_) ascend_sim::fail("LocalTensor[%u]: the tensor has %u elements", offset, length_);
    LocalTensor rest = *this;
    rest.address_ += offset * sizeof(T);
    rest.length_ -= offset;
    return rest;
  }

  T GetValue(uint32_t i) const {
    element("GetValue", i);
    ascend_sim::core().issue(ascend_sim::kScalar);
    ascend_sim::core().read("GetValue", ascend_sim::kScalar, address_ + i * sizeof(T), sizeof(T));
    return data()[i];
  }

  void SetValue(uint32_t i, T value) const {
    element("SetValue", i);
    ascend_sim::core().issue(ascend_sim::kScalar);
    ascend_sim::core().write("SetValue", ascend_sim::kScalar, address_ + i * sizeof(T), sizeof(T));
    data()[i] = value;
  }

  template <class U>
  LocalTensor<U> ReinterpretCast() const {
    return {address_, static_cast<uint32_t>(length_ * sizeof(T) / sizeof(U)), position_, slot_, generation_};
  }

  // What follows is the stand-in's own.
  T* data() const { return reinterpret_cast<T*>(ascend_sim::core().at(address_)); }
  uint32_t address() const { return address_; }
  TPosition position() const { return position_; }
  int32_t slot() const { return slot_; }
  uint32_t generation() const { return generation_; }

  void usable(const char* api, int64_t count, uint32_t alignment = ascend_sim::kBlockBytes) const {
    if (!length_ && !address_ && position_ == TPosition::GM) {
      ascend_sim::fail("%s: a tensor that was never allocated", api);
    }
    if (slot_ >= 0 && ascend_sim::core().generations[slot_] != generation_) {
      ascend_sim::fail("%s: a stale tensor: its buffer was enqueued or freed since", api);
    }
    if (address_ % alignment) {
      ascend_sim::fail("%s: buffer address %u is not aligned to %u bytes", api, address_, alignment);
    }
    if (count < 0 || count > length_) {
      ascend_sim::fail("%s: %lld elements of a tensor of %u", api, static_cast<long long>(count), length_);
    }
  }

 private:
  void element(const char* api, uint32_t i) const {
    usable(api, 0, sizeof(T));
    if (i >= length_) ascend_sim::fail("%s(%u): the tensor has %u elements", api, i, length_);
  }

  uint32_t address_ = 0, length_ = 0;
  TPosition position_ = TPosition::GM;
  int32_t slot_ = -1;  // buffer of a queue
  uint32_t generation_ = 0;
};

template <class T>
class GlobalTensor {
 public:
  void SetGlobalBuffer(T* start, uint64_t length) {
    start_ = start;
    length_ = length;
  }

  GlobalTensor operator[](uint64_t offset) const {
    if (offset > length_) {
      ascend_sim::fail("GlobalTensor[%llu]: the tensor has %llu elements", static_cast<unsigned long long>(offset),
                       static_cast<unsigned long long>(length_));
    }
    GlobalTensor rest;
    rest.SetGlobalBuffer(start_ + offset, length_ - offset);
    return rest;
  }

  T GetValue(uint64_t i) const {
    if (i >= length_) {
      ascend_sim::fail("GlobalTensor.GetValue(%llu): the tensor has %llu elements", static_cast<unsigned long long>(i),
                       static_cast<unsigned long long>(length_));
    }
    ascend_sim::core().issue(ascend_sim::kScalar, sizeof(T));
    ascend_sim::current_memory()->read("GlobalTensor.GetValue", ascend_sim::kScalar, start_ + i, sizeof(T));
    return start_[i];
  }

  // What follows is the stand-in's own.
  T* data() const { return start_; }
  uint64_t length() const { return length_; }

 private:
  T* start_ = nullptr;
  uint64_t length_ = 0;
};

}  // namespace AscendC
