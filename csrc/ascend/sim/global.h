// Global memory: the arguments of a launch and who touches them. Outside them there is nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "core.h"

namespace ascend_sim {

// An argument of the kernel: its bytes, and for one that is written a shadow of every two bytes.
struct Region {
  uint8_t* start = nullptr;
  uint64_t bytes = 0;
  bool writable = false;
  std::vector<Touch> touches;
  std::vector<int32_t> writers, readers;  // block that touched it, kNobody, or kSeveral
};

class GlobalMemory {
 public:
  void add(const void* start, uint64_t bytes, bool writable);
  void forget_order();  // a new block: its pipes have no history here, only other blocks have
  void read(const char* api, Pipe pipe, const void* address, uint64_t bytes);
  void write(const char* api, Pipe pipe, const void* address, uint64_t bytes);

 private:
  Region& find(const char* api, const void* address, uint64_t bytes);
  std::vector<Region> regions_;
};

GlobalMemory*& current_memory();

}  // namespace ascend_sim
