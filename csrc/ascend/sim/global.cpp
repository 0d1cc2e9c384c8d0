#include "global.h"

#include <algorithm>

namespace ascend_sim {
namespace {

constexpr int32_t kNobody = -1, kSeveral = -2;
constexpr uint64_t kGranule = 2;

}  // namespace

void GlobalMemory::add(const void* start, uint64_t bytes, bool writable) {
  Region region;
  region.start = static_cast<uint8_t*>(const_cast<void*>(start));
  region.bytes = bytes;
  region.writable = writable;
  if (writable) {
    const uint64_t granules = (bytes + kGranule - 1) / kGranule;
    region.touches.resize(granules);
    region.writers.assign(granules, kNobody);
    region.readers.assign(granules, kNobody);
  }
  regions_.push_back(std::move(region));
}

void GlobalMemory::forget_order() {
  for (Region& region : regions_) std::fill(region.touches.begin(), region.touches.end(), Touch{});
}

Region& GlobalMemory::find(const char* api, const void* address, uint64_t bytes) {
  const auto* at = static_cast<const uint8_t*>(address);
  for (Region& region : regions_) {
    if (at >= region.start && at + bytes <= region.start + region.bytes) return region;
  }
  fail("%s: %llu bytes of global memory lie outside every argument of the kernel", api,
       static_cast<unsigned long long>(bytes));
}

void GlobalMemory::read(const char* api, Pipe pipe, const void* address, uint64_t bytes) {
  if (!bytes) return;
  Region& region = find(api, address, bytes);
  if (!region.writable) return;
  const auto mine = static_cast<int32_t>(core().block);
  const uint64_t start = static_cast<const uint8_t*>(address) - region.start;
  for (uint64_t i = start / kGranule; i < (start + bytes + kGranule - 1) / kGranule; ++i) {
    if (region.writers[i] != kNobody && region.writers[i] != mine) {
      fail("%s: race between blocks: %d reads byte %llu of an argument that %d writes", api, mine,
           static_cast<unsigned long long>(i * kGranule), region.writers[i]);
    }
    if (pipe == kScalar && region.writers[i] == mine) {
      fail("%s: the scalar pipe reads global memory that this launch wrote, past its data cache", api);
    }
    region.readers[i] = region.readers[i] == kNobody || region.readers[i] == mine ? mine : kSeveral;
    core().judge_read(api, pipe, region.touches[i], "global byte", i * kGranule);
  }
}

void GlobalMemory::write(const char* api, Pipe pipe, const void* address, uint64_t bytes) {
  if (!bytes) return;
  Region& region = find(api, address, bytes);
  if (!region.writable) fail("%s: writes an argument that the kernel only reads", api);
  const auto mine = static_cast<int32_t>(core().block);
  const uint64_t start = static_cast<const uint8_t*>(address) - region.start;
  for (uint64_t i = start / kGranule; i < (start + bytes + kGranule - 1) / kGranule; ++i) {
    const bool read = region.readers[i] != kNobody && region.readers[i] != mine;
    if (read || (region.writers[i] != kNobody && region.writers[i] != mine)) {
      fail("%s: race between blocks: %d writes byte %llu of an argument that another block %s", api, mine,
           static_cast<unsigned long long>(i * kGranule), read ? "reads" : "writes");
    }
    region.writers[i] = mine;
    core().judge_write(api, pipe, region.touches[i], "global byte", i * kGranule);
  }
}

GlobalMemory*& current_memory() {
  static thread_local GlobalMemory* memory = nullptr;
  return memory;
}

}  // namespace ascend_sim
