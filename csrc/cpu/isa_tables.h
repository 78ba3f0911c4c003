// SPDX-License-Identifier: Apache-2.0
// The instruction sets: functions that return their tables. Only the three that list them call them, and only
// where the processor has the instructions: dispatch.cpp, training.cpp, yardsticks.cpp. What nobody lists is
// not linked. A set that extends another starts from what that one returns.
#pragma once

#include <array>
#include <cstddef>

#include "dispatch.h"
#include "kernels.h"
#include "target.h"

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

KernelTable scalar();
KernelTable avx2();
KernelTable avx512();
KernelTable avx512_bitalg();
KernelTable avx512_amx();
KernelTable neon();
KernelTable neon_dot();

TrainingTable scalar_training();
TrainingTable avx2_training();
TrainingTable avx512_training();
TrainingTable neon_training();

YardstickTable scalar_yardsticks();
YardstickTable avx2_yardsticks();
YardstickTable avx512_yardsticks();
YardstickTable avx512_bitalg_yardsticks();
YardstickTable avx512_amx_yardsticks();
YardstickTable neon_yardsticks();
YardstickTable neon_dot_yardsticks();

// Makers in the order of dispatch.cpp's list of names; null where this build has no such code.
constexpr int kIsaCount = 7;
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
