// SPDX-License-Identifier: Apache-2.0
// The check of all C++ tests: what does not hold ends the program.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK(condition, ...)                                                   \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::printf("%s:%d: %s does not hold: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                                 \
      std::printf("\n");                                                        \
      std::exit(1);                                                             \
    }                                                                           \
  } while (0)
