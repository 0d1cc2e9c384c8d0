// The one way the stand-in speaks: an error that names the call, the value and the rule it breaks.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <stdexcept>

namespace ascend_sim {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  throw Error(text);
}

}  // namespace ascend_sim
