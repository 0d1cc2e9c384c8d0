#include "core.h"

#include <algorithm>
#include <cstring>

namespace ascend_sim {

const char* name_of(int pipe) {
  static const char* const names[] = {"S", "V", "MTE2", "MTE3", "nobody"};
  return names[pipe];
}

Core::Core(uint32_t block, uint32_t num_blocks)
    : block(block), num_blocks(num_blocks), buffer_(kBufferBytes, 0xFF), shadow_(kBufferBytes / kBlockBytes) {}

void Core::issue(Pipe pipe, uint64_t bytes) {
  ++issued_[pipe];
  ++counters.instructions[pipe];
  counters.bytes[pipe] += bytes;
}

void Core::check_range(const char* api, uint32_t address, uint64_t bytes) const {
  if (address + bytes > kBufferBytes) {
    fail("%s: bytes %u..%llu lie beyond the unified buffer of %u", api, address,
         static_cast<unsigned long long>(address + bytes), kBufferBytes);
  }
}

void Core::judge_read(const char* api, Pipe pipe, Touch& touch, const char* where, uint64_t address) {
  const uint8_t writer = touch.writer;
  const bool settled =
      writer == kPipes || (writer == kScalar && pipe == kScalar) || touch.written <= known_[pipe][writer];
  if (!settled) {
    if (writer == pipe && touch.written == issued_[pipe]) {
      fail("%s: reads %s %llu, which an earlier repeat of the same instruction wrote", api, where,
           static_cast<unsigned long long>(address));
    }
    if (writer == pipe) {
      fail("%s: read after write of %s %llu by %s without PipeBarrier<PIPE_%s>", api, where,
           static_cast<unsigned long long>(address), name_of(pipe), name_of(pipe));
    }
    fail("%s: read after write, %s reads %s %llu before %s is known to have written it", api, name_of(pipe), where,
         static_cast<unsigned long long>(address), name_of(writer));
  }
  touch.read[pipe] = issued_[pipe];
}

void Core::judge_write(const char* api, Pipe pipe, Touch& touch, const char* where, uint64_t address) {
  const uint8_t writer = touch.writer;
  const auto at = static_cast<unsigned long long>(address);
  if (writer != kPipes && !(writer == kScalar && pipe == kScalar) && touch.written > known_[pipe][writer] &&
      !(writer == pipe && touch.written == issued_[pipe])) {
    if (writer == pipe) {
      fail("%s: write after write of %s %llu by %s without PipeBarrier<PIPE_%s>", api, where, at, name_of(pipe),
           name_of(pipe));
    }
    fail("%s: write after write, %s overwrites %s %llu before %s is known to have written it", api, name_of(pipe),
         where, at, name_of(writer));
  }
  for (int other = 0; other < kPipes; ++other) {
    const bool own = other == pipe && (pipe == kScalar || touch.read[other] == issued_[pipe]);
    if (own || touch.read[other] <= known_[pipe][other]) continue;
    if (other == pipe) {
      fail("%s: write after read of %s %llu by %s without PipeBarrier<PIPE_%s>", api, where, at, name_of(pipe),
           name_of(pipe));
    }
    fail("%s: write after read, %s overwrites %s %llu before %s is known to have read it", api, name_of(pipe), where,
         at, name_of(other));
  }
  touch.writer = pipe;
  touch.written = issued_[pipe];
}

void Core::read(const char* api, Pipe pipe, uint32_t address, uint32_t bytes) {
  check_range(api, address, bytes);
  for (uint32_t at = address, end = address + bytes; at < end;) {
    const uint32_t stop = std::min(end, (at / kBlockBytes + 1) * kBlockBytes);
    Shadow& shadow = shadow_[at / kBlockBytes];
    const uint32_t first = at % kBlockBytes / 2, last = (stop - 1) % kBlockBytes / 2;
    const uint32_t wanted = ((2u << last) - 1) & ~((1u << first) - 1);
    if ((shadow.defined & wanted) != wanted) {
      fail("%s: %s reads buffer bytes %u..%u that nothing has written", api, name_of(pipe), at, stop);
    }
    judge_read(api, pipe, shadow.touch, "buffer byte", at);
    at = stop;
  }
}

void Core::write(const char* api, Pipe pipe, uint32_t address, uint32_t bytes) {
  check_range(api, address, bytes);
  for (uint32_t at = address, end = address + bytes; at < end;) {
    const uint32_t stop = std::min(end, (at / kBlockBytes + 1) * kBlockBytes);
    Shadow& shadow = shadow_[at / kBlockBytes];
    judge_write(api, pipe, shadow.touch, "buffer byte", at);
    const uint32_t first = at % kBlockBytes / 2, last = (stop - 1) % kBlockBytes / 2;
    shadow.defined |= static_cast<uint16_t>(((2u << last) - 1) & ~((1u << first) - 1));
    at = stop;
  }
}

Clock Core::now(Pipe pipe) const {
  Clock clock = known_[pipe];
  clock[pipe] = issued_[pipe];
  return clock;
}

void Core::learn(Pipe pipe, const Clock& clock) {
  for (int i = 0; i < kPipes; ++i) known_[pipe][i] = std::max(known_[pipe][i], clock[i]);
}

void Core::set_flag(Pipe from, Pipe to, int event) {
  if (event < 0 || event >= kMaxEvents) {
    fail("SetFlag<%s_%s>: event id %d is not in 0..%d", name_of(from), name_of(to), event, kMaxEvents - 1);
  }
  if (!flags_.emplace(std::array<int, 3>{from, to, event}, now(from)).second) {
    fail("SetFlag<%s_%s>: event %d is set already and nobody has waited for it", name_of(from), name_of(to), event);
  }
}

void Core::wait_flag(Pipe from, Pipe to, int event) {
  const auto found = flags_.find({from, to, event});
  if (found == flags_.end()) {
    fail("WaitFlag<%s_%s>: event %d was never set, so the core hangs", name_of(from), name_of(to), event);
  }
  learn(to, found->second);
  flags_.erase(found);
  if (to == kScalar) {
    ++counters.scalar_waits;
    // what the program issues from here on is issued after the wait; the scalar pipe's own
    // stores need their flag all the same
    for (int pipe = kVector; pipe < kPipes; ++pipe) {
      for (int other = kVector; other < kPipes; ++other) {
        known_[pipe][other] = std::max(known_[pipe][other], known_[kScalar][other]);
      }
    }
  }
}

void Core::barrier(Pipe pipe) {
  ++counters.barriers;
  known_[pipe][pipe] = issued_[pipe];
}

void Core::barrier_all() {
  ++counters.barriers;
  for (Clock& clock : known_) clock = issued_;
}

uint32_t Core::allocate(uint32_t num, uint32_t bytes) {
  bytes = (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
  if ((buffers_ += num) > kMaxBuffers) fail("InitBuffer: %u buffers, and a kernel may have %u", buffers_, kMaxBuffers);
  const uint32_t address = top_;
  if (address + static_cast<uint64_t>(num) * bytes > kBufferBytes) {
    fail("InitBuffer: the unified buffer overflows: %u bytes in use, %u x %u more, of %u", top_, num, bytes,
         kBufferBytes);
  }
  top_ += num * bytes;
  counters.buffer_bytes = top_;
  return address;
}

void Core::poison(uint32_t address, uint32_t bytes) {
  for (uint32_t i = address / kBlockBytes; i < (address + bytes) / kBlockBytes; ++i) shadow_[i].defined = 0;
  std::memset(at(address), 0xFF, bytes);
}

void Core::live(int position, int change) {
  if ((live_[position] += change) > static_cast<int>(kMaxLivePerPosition)) {
    fail("AllocTensor: more than %u tensors of one position are allocated at once", kMaxLivePerPosition);
  }
}

void Core::finish() {
  for (const auto& [key, clock] : flags_) {
    fail("the kernel ended with flag %s_%s (event %d) still set", name_of(key[0]), name_of(key[1]), key[2]);
  }
}

Core*& current_core() {
  static thread_local Core* current = nullptr;
  return current;
}

Core& core() {
  if (!current_core()) fail("an AscendC call outside a kernel launch");
  return *current_core();
}

}  // namespace ascend_sim
