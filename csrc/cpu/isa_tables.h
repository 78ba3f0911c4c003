// SPDX-License-Identifier: Apache-2.0
// The instruction sets: functions that return their tables, called only where the processor has the
// instructions. Kernels are listed by dispatch.cpp, loops of training by training.cpp, yardsticks by
// yardsticks.cpp: what nobody lists is not linked. A set that extends another starts from what that one
// returns.
#pragma once

#include <array>
#include <cstddef>

#include "dispatch.h"
#include "kernels.h"
#include "target.h"

// The one list of them, from the plainest to the best: name, whose loops of training it has, the processors
// that it is compiled for, the bits of dispatch.cpp's Feature that it needs, and these in words. SET is a
// macro.
#define BOP2ND_INSTRUCTION_SETS(SET)                                                                    \
  SET(scalar, scalar, ANY, 0, "any CPU")                                                                \
  SET(avx2, avx2, X86, kAvx2, "x86-64 with AVX2, FMA, F16C, POPCNT, BMI, BMI2")                         \
  SET(avx512, avx512, X86, kAvx512, "x86-64 with AVX-512 F, BW, VL, DQ")                                \
  SET(avx512_bitalg, avx512, X86, kAvx512 | kBitalg, "x86-64 with AVX-512 F, BW, VL, DQ, BITALG, VNNI") \
  SET(avx512_amx, avx512, X86, kAvx512 | kBitalg | kAmx,                                                \
      "x86-64 with AVX-512 F, BW, VL, DQ, BITALG, VNNI, VBMI, GFNI, AMX-INT8 (granted by the kernel)")  \
  SET(neon, neon, NEON, kNeon, "64-bit ARM with NEON")                                                  \
  SET(neon_dot, neon, NEON, kNeon | kDotProduct, "64-bit ARM with NEON and UDOT (dot product of ARMv8.2)")

// A maker, or null where this build has no such code.
#define BOP2ND_IF_ANY(make) make
#if BOP2ND_X86
#define BOP2ND_IF_X86(make) make
#else
#define BOP2ND_IF_X86(make) nullptr
#endif
#if BOP2ND_NEON
#define BOP2ND_IF_NEON(make) make
#else
#define BOP2ND_IF_NEON(make) nullptr
#endif

namespace bop2nd {

#define BOP2ND_DECLARE(name, training, code, needs, text) \
  KernelTable name();                                     \
  TrainingTable training##_training();                    \
  YardstickTable name##_yardsticks();
BOP2ND_INSTRUCTION_SETS(BOP2ND_DECLARE)
#undef BOP2ND_DECLARE

#define BOP2ND_COUNT(...) +1
constexpr int kIsaCount = BOP2ND_INSTRUCTION_SETS(BOP2ND_COUNT);
#undef BOP2ND_COUNT

template <class Table>
using Makers = Table (*const[kIsaCount])();

// The tables of the instruction sets that this machine can run.
template <class Table>
std::array<Table, kIsaCount> make_all(const Makers<Table>& makers) {
  std::array<Table, kIsaCount> made{};
  for (int id = 0; id < kIsaCount; ++id) {
    if (bop2nd_isa_supported(id)) made[static_cast<size_t>(id)] = makers[id]();
  }
  return made;
}

}  // namespace bop2nd
