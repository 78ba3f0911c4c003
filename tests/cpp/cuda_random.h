// SPDX-License-Identifier: Apache-2.0
// What the tests of the CUDA kernels' host side share: random words, a check that goes on, and its report.
#pragma once

#include <cstdint>
#include <cstdio>
#include <vector>

namespace bop2nd::cuda {

inline int n_checks = 0, n_failures = 0;

#define CHECK(condition)                                                             \
  do {                                                                               \
    ++bop2nd::cuda::n_checks;                                                        \
    if (!(condition) && ++bop2nd::cuda::n_failures <= 20)                            \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
  } while (0)

inline int report(const char* what) {
  std::printf("%s: %d checks, %d failed\n", what, n_checks, n_failures);
  return n_failures == 0 && n_checks > 0 ? 0 : 1;
}

// xorshift64*: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
  uint32_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>((state_ * 0x2545F4914F6CDD1Du) >> 32);
  }
  int below(int n) { return static_cast<int>(next() % static_cast<uint32_t>(n)); }
  float uniform() { return static_cast<float>(static_cast<int32_t>(next())) * 0x1p-31f; }  // -1 .. 1
  std::vector<uint32_t> words(size_t n) {
    std::vector<uint32_t> w(n);
    for (uint32_t& x : w) x = next();
    return w;
  }

 private:
  uint64_t state_;
};

}  // namespace bop2nd::cuda
