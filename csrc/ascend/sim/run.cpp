#include "run.h"

#include <algorithm>

namespace ascend_sim {
namespace {

constexpr size_t kReports = 64;  // are kept, for callers that never look at them

}  // namespace

bool& backwards() {
  static thread_local bool value = false;
  return value;
}

std::vector<Report>& reports() {
  static thread_local std::vector<Report> value;
  return value;
}

void run(uint32_t blocks, const std::vector<Argument>& arguments, const std::function<void()>& kernel) {
  GlobalMemory memory;
  for (const Argument& argument : arguments) {
    if (argument.start && argument.bytes) memory.add(argument.start, argument.bytes, argument.writable);
  }
  if (reports().size() >= kReports) reports().clear();
  Report& report = reports().emplace_back();
  report.blocks.resize(blocks);
  current_memory() = &memory;
  const auto leave = [] {
    current_core() = nullptr;
    current_memory() = nullptr;
  };
  for (uint32_t i = 0; i < blocks; ++i) {
    const uint32_t block = backwards() ? blocks - 1 - i : i;
    Core core(block, blocks);
    memory.forget_order();
    current_core() = &core;
    try {
      kernel();
      core.finish();
    } catch (...) {
      leave();
      throw;
    }
    report.blocks[block] = core.counters;
    Counters& total = report.total;
    for (int pipe = 0; pipe < kPipes; ++pipe) {
      total.instructions[pipe] += core.counters.instructions[pipe];
      total.bytes[pipe] += core.counters.bytes[pipe];
    }
    total.repeats += core.counters.repeats;
    total.barriers += core.counters.barriers;
    total.scalar_waits += core.counters.scalar_waits;
    total.buffer_bytes = std::max(total.buffer_bytes, core.counters.buffer_bytes);
  }
  leave();
}

const char* caught(const std::function<void()>& f) {
  static thread_local std::string text;
  text.clear();
  reports().clear();
  try {
    f();
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}

}  // namespace ascend_sim

extern "C" {

void sim_backwards(int yes) { ascend_sim::backwards() = yes != 0; }

// Counters of a run of the last call (a launcher may start two kernels): of block `block`, or of all where it is -1.
// out [12]: instructions and bytes of S, V, MTE2, MTE3; repeats, barriers, scalar waits, bytes of the unified buffer.
void sim_counters(int run, int block, uint64_t* out) {
  const ascend_sim::Report& report = ascend_sim::reports().at(run);
  const ascend_sim::Counters& c = block < 0 ? report.total : report.blocks.at(block);
  for (int pipe = 0; pipe < ascend_sim::kPipes; ++pipe) {
    out[pipe] = c.instructions[pipe];
    out[ascend_sim::kPipes + pipe] = c.bytes[pipe];
  }
  out[8] = c.repeats;
  out[9] = c.barriers;
  out[10] = c.scalar_waits;
  out[11] = c.buffer_bytes;
}
}
