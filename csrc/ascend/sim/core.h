// One vector core: its unified buffer, the pipes that work on it side by side, and each pipe's knowledge of the others.
//
// A kernel runs in program order, but on the device its instructions go to pipes (scalar, vector, MTE2 into the
// buffer, MTE3 out of it) that do not wait for one another. So every access is judged by a vector clock: pipe p may
// touch what instruction n of pipe q wrote only if p knows that q has finished n, through a flag, a queue or a
// barrier. The shadow of the buffer keeps, for each block of 32 bytes, who wrote and read it last, and for each two
// bytes whether anything was ever written there.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <vector>

#include "error.h"

namespace ascend_sim {

constexpr uint32_t kBufferBytes = 196608;
constexpr uint32_t kBlockBytes = 32;
constexpr uint32_t kRepeatBytes = 256;
constexpr uint32_t kMaxRepeats = 255;
constexpr uint32_t kMaxBuffers = 64;        // of a kernel
constexpr uint32_t kMaxLivePerPosition = 8;  // tensors allocated and not freed
constexpr int kMaxEvents = 8;

enum Pipe : uint8_t { kScalar, kVector, kMte2, kMte3, kPipes };
const char* name_of(int pipe);

using Clock = std::array<uint32_t, kPipes>;  // how far each pipe is known to have come

struct Counters {
  std::array<uint64_t, kPipes> instructions{};
  std::array<uint64_t, kPipes> bytes{};
  uint64_t repeats = 0;  // of the vector pipe: 256 bytes each
  uint64_t barriers = 0;
  uint64_t buffer_bytes = 0;  // of the unified buffer, allocated
  uint64_t scalar_waits = 0;  // flags the scalar pipe waited for: the kernel's program stands still there
};

// The pipes that touched a stretch of memory last.
struct Touch {
  uint8_t writer = kPipes;
  uint32_t written = 0;
  Clock read{};
};

class Core {
 public:
  Core(uint32_t block, uint32_t num_blocks);

  // The next instruction of a pipe.
  void issue(Pipe pipe, uint64_t bytes = 0);
  void read(const char* api, Pipe pipe, uint32_t address, uint32_t bytes);
  void write(const char* api, Pipe pipe, uint32_t address, uint32_t bytes);
  // The same judgement for memory outside the buffer.
  void judge_read(const char* api, Pipe pipe, Touch& touch, const char* where, uint64_t address);
  void judge_write(const char* api, Pipe pipe, Touch& touch, const char* where, uint64_t address);

  void set_flag(Pipe from, Pipe to, int event);
  void wait_flag(Pipe from, Pipe to, int event);
  void barrier(Pipe pipe);
  void barrier_all();
  Clock now(Pipe pipe) const;
  void learn(Pipe pipe, const Clock& clock);

  uint32_t allocate(uint32_t num, uint32_t bytes);
  void poison(uint32_t address, uint32_t bytes);  // what a newly allocated tensor holds is not defined
  void live(int position, int change);
  void finish();  // at the end of the kernel nothing may be pending

  uint8_t* at(uint32_t address) { return buffer_.data() + address; }
  void check_range(const char* api, uint32_t address, uint64_t bytes) const;

  const uint32_t block, num_blocks;
  Counters counters;
  std::vector<uint32_t> generations;  // of the queues' buffers: a tensor of an older one is stale

 private:
  struct Shadow {
    Touch touch;
    uint16_t defined = 0;
  };
  std::vector<uint8_t> buffer_;
  std::vector<Shadow> shadow_;
  Clock issued_{};
  std::array<Clock, kPipes> known_{};
  std::map<std::array<int, 3>, Clock> flags_;
  uint32_t top_ = 0, buffers_ = 0;
  std::array<int, 4> live_{};
};

Core& core();          // the one that runs now; an error outside a launch
Core*& current_core();

}  // namespace ascend_sim
