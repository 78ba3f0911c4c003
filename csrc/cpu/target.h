// SPDX-License-Identifier: Apache-2.0
// Instruction sets belong to functions, not to the build: BOP2ND_TARGET_BEGIN("avx2") ... BOP2ND_TARGET_END
// compiles everything between for that set. Only our own headers go in between; system headers come before.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define BOP2ND_X86 1
#else
#define BOP2ND_X86 0
#endif

#if defined(__aarch64__) && defined(__ARM_NEON)
#define BOP2ND_NEON 1
#else
#define BOP2ND_NEON 0
#endif

#define BOP2ND_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define BOP2ND_TARGET_BEGIN(isa) \
  BOP2ND_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define BOP2ND_TARGET_END _Pragma("clang attribute pop")
#else
#define BOP2ND_TARGET_BEGIN(isa) _Pragma("GCC push_options") BOP2ND_PRAGMA(GCC target(isa))
#define BOP2ND_TARGET_END _Pragma("GCC pop_options")
#endif

#define BOP2ND_INLINE inline __attribute__((always_inline))
