// Runs a kernel's blocks one after another, forwards or backwards: no result may depend on the order.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "core.h"
#include "global.h"

namespace ascend_sim {

struct Argument {
  const void* start;
  uint64_t bytes;
  bool writable;
};

// Throws Error at the first broken rule.
void run(uint32_t blocks, const std::vector<Argument>& arguments, const std::function<void()>& kernel);

struct Report {
  Counters total;
  std::vector<Counters> blocks;
};
std::vector<Report>& reports();  // of the latest runs; `caught` begins anew
bool& backwards();

// Runs f; what it throws becomes text, "" when nothing. For callers that are not C++.
const char* caught(const std::function<void()>& f);

}  // namespace ascend_sim
