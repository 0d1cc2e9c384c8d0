// The entry points of op_kernel/entry.cpp, by element types, for the launchers.
#pragma once

#include "launch.h"

#define PICK_1(NAME, E) ((E) == Element::kFloat32 ? NAME##_f32 : NAME##_bf16)
#define PICK_2(NAME, E, F)                                                                          \
  ((E) == Element::kFloat32 ? ((F) == Element::kFloat32 ? NAME##_f32_f32 : NAME##_f32_bf16)          \
                            : ((F) == Element::kFloat32 ? NAME##_bf16_f32 : NAME##_bf16_bf16))
