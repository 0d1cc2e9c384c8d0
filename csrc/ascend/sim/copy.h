// DataCopy and DataCopyPad between global memory and the unified buffer.
#pragma once

#include "tensor.h"

#define __gm__

namespace AscendC {

struct DataCopyExtParams {
  uint16_t blockCount = 1;
  uint32_t blockLen = 0;   // bytes
  // between the end of a block and the next: bytes in global memory, units of 32 bytes in the buffer
  uint32_t srcStride = 0;
  uint32_t dstStride = 0;
  uint32_t rsv = 0;
};

template <class T>
struct DataCopyPadExtParams {
  bool isPad = false;
  uint8_t leftPadding = 0;  // elements
  uint8_t rightPadding = 0;
  T paddingValue{};
};

namespace detail {

template <class T>
void check_local(const char* api, const LocalTensor<T>& tensor, uint64_t bytes) {
  tensor.usable(api, 0);
  if (tensor.position() == TPosition::VECCALC) {
    ascend_sim::fail("%s: VECCALC is not a position that data is moved to or from", api);
  }
  if (bytes > static_cast<uint64_t>(tensor.GetSize()) * sizeof(T)) {
    ascend_sim::fail("%s: %llu bytes in a tensor of %zu", api, static_cast<unsigned long long>(bytes),
                     tensor.GetSize() * sizeof(T));
  }
}

template <class T>
void check_global(const char* api, const GlobalTensor<T>& tensor, uint64_t bytes) {
  if (bytes > tensor.length() * sizeof(T)) {
    ascend_sim::fail("%s: %llu bytes of a global tensor that has %llu left", api,
                     static_cast<unsigned long long>(bytes),
                     static_cast<unsigned long long>(tensor.length() * sizeof(T)));
  }
}

template <class T>
void check_aligned(const LocalTensor<T>& local, const GlobalTensor<T>& global, uint32_t count) {
  local.usable("DataCopy", count);
  if (count * sizeof(T) % ascend_sim::kBlockBytes) {
    ascend_sim::fail("DataCopy: %zu bytes are no multiple of 32; use DataCopyPad", count * sizeof(T));
  }
  if (reinterpret_cast<uintptr_t>(global.data()) % ascend_sim::kBlockBytes) {
    ascend_sim::fail("DataCopy: the address in global memory is not aligned to 32 bytes; use DataCopyPad");
  }
  check_local("DataCopy", local, count * sizeof(T));
  check_global("DataCopy", global, count * sizeof(T));
}

inline void check_blocks(const DataCopyExtParams& p, size_t element) {
  if (p.blockCount > 4095 || p.blockLen > 2097151) {
    ascend_sim::fail("DataCopyPad: %u blocks of %u bytes, and 4095 of 2097151 are allowed", p.blockCount, p.blockLen);
  }
  if (p.blockLen % element) {
    ascend_sim::fail("DataCopyPad: blocks of %u bytes are not whole elements of %zu", p.blockLen, element);
  }
}

inline uint32_t padded(uint32_t bytes) {
  return (bytes + ascend_sim::kBlockBytes - 1) / ascend_sim::kBlockBytes * ascend_sim::kBlockBytes;
}

}  // namespace detail

template <class T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, uint32_t count) {
  detail::check_aligned(dst, src, count);
  const uint32_t bytes = count * sizeof(T);
  ascend_sim::Core& core = ascend_sim::core();
  core.issue(ascend_sim::kMte2, bytes);
  ascend_sim::current_memory()->read("DataCopy", ascend_sim::kMte2, src.data(), bytes);
  core.write("DataCopy", ascend_sim::kMte2, dst.address(), bytes);
  std::memcpy(core.at(dst.address()), src.data(), bytes);
}

template <class T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count) {
  detail::check_aligned(src, dst, count);
  const uint32_t bytes = count * sizeof(T);
  ascend_sim::Core& core = ascend_sim::core();
  core.issue(ascend_sim::kMte3, bytes);
  core.read("DataCopy", ascend_sim::kMte3, src.address(), bytes);
  ascend_sim::current_memory()->write("DataCopy", ascend_sim::kMte3, dst.data(), bytes);
  std::memcpy(dst.data(), core.at(src.address()), bytes);
}

template <class T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyExtParams& p,
                 const DataCopyPadExtParams<T>& pad) {
  detail::check_blocks(p, sizeof(T));
  const uint32_t left = pad.leftPadding * sizeof(T), right = pad.rightPadding * sizeof(T);
  if (left > ascend_sim::kBlockBytes || right > ascend_sim::kBlockBytes) {
    ascend_sim::fail("DataCopyPad: more than 32 bytes of padding");
  }
  if (!p.blockCount || !p.blockLen) return;
  const uint32_t width = detail::padded(left + p.blockLen + right),
                 step = width + p.dstStride * ascend_sim::kBlockBytes;
  detail::check_local("DataCopyPad", dst, static_cast<uint64_t>(p.blockCount - 1) * step + width);
  detail::check_global("DataCopyPad", src,
                       static_cast<uint64_t>(p.blockCount - 1) * (p.blockLen + p.srcStride) + p.blockLen);
  ascend_sim::Core& core = ascend_sim::core();
  core.issue(ascend_sim::kMte2, static_cast<uint64_t>(p.blockCount) * p.blockLen);
  for (uint32_t i = 0; i < p.blockCount; ++i) {
    const uint8_t* from =
        reinterpret_cast<const uint8_t*>(src.data()) + static_cast<uint64_t>(i) * (p.blockLen + p.srcStride);
    const uint32_t to = dst.address() + i * step;
    ascend_sim::current_memory()->read("DataCopyPad", ascend_sim::kMte2, from, p.blockLen);
    core.write("DataCopyPad", ascend_sim::kMte2, to, width);
    // what fills the last block up: the first element where no padding is asked for, else the
    // padding value, or nothing known
    std::memset(core.at(to), 0xFF, width);
    T fill;
    std::memcpy(&fill, left || right ? reinterpret_cast<const uint8_t*>(&pad.paddingValue) : from, sizeof(T));
    if (pad.isPad || !(left || right)) {
      for (uint32_t at = 0; at < width; at += sizeof(T)) std::memcpy(core.at(to + at), &fill, sizeof(T));
    }
    std::memcpy(core.at(to + left), from, p.blockLen);
  }
}

template <class T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyExtParams& p) {
  detail::check_blocks(p, sizeof(T));
  if (!p.blockCount || !p.blockLen) return;
  const uint32_t width = detail::padded(p.blockLen), step = width + p.srcStride * ascend_sim::kBlockBytes;
  detail::check_local("DataCopyPad", src, static_cast<uint64_t>(p.blockCount - 1) * step + width);
  detail::check_global("DataCopyPad", dst,
                       static_cast<uint64_t>(p.blockCount - 1) * (p.blockLen + p.dstStride) + p.blockLen);
  ascend_sim::Core& core = ascend_sim::core();
  core.issue(ascend_sim::kMte3, static_cast<uint64_t>(p.blockCount) * p.blockLen);
  for (uint32_t i = 0; i < p.blockCount; ++i) {
    uint8_t* to = reinterpret_cast<uint8_t*>(dst.data()) + static_cast<uint64_t>(i) * (p.blockLen + p.dstStride);
    const uint32_t from = src.address() + i * step;
    core.read("DataCopyPad", ascend_sim::kMte3, from, p.blockLen);
    ascend_sim::current_memory()->write("DataCopyPad", ascend_sim::kMte3, to, p.blockLen);
    std::memcpy(to, core.at(from), p.blockLen);
  }
}

}  // namespace AscendC
