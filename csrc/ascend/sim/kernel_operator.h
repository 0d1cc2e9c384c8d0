// The host stand-in for the AscendC header of this name: the calls our kernels use, run on the host one block after
// another, with the rules of the public documentation enforced (docs/ascend-kernels.md lists them with their sources).
// Not a simulator of speed, and never shipped.
#pragma once

#include "copy.h"
#include "core.h"
#include "queue.h"
#include "reduce.h"
#include "select.h"
#include "sync.h"
#include "vector.h"

#define __aicore__
#define __global__
#define GM_ADDR uint8_t*
#define KERNEL_TASK_TYPE_DEFAULT(TYPE)  // the stand-in has vector cores only

namespace AscendC {

template <class A, class B>
struct IsSameType {
  static constexpr bool value = std::is_same_v<A, B>;
};

}  // namespace AscendC
