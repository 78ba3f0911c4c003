// SPDX-License-Identifier: Apache-2.0
// What both gradients of a binary convolution share: products of the real gradient of its outputs with the
// signs of its weights or of its input, as sums of 32 (signed_sums.inl). No sign is ever unpacked.
//
// A sum's order depends on the shape alone, not on the tasks that the work is cut into, nor on the lanes of
// an instruction set: gradients are the same bits on any number of threads and any processor.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "../core/bit_layout.h"
#include "convolution.h"
#include "parallel.h"

namespace bop2nd::gradient {

// A thread's sums are kept near this size, so that they stay in the second-level cache.
constexpr int64_t kSumBytes = 1 << 17;
constexpr int64_t kTasksPerThread = 3;
// Below this many multiply-accumulates the work is not worth a second thread.
constexpr int64_t kSerialProducts = 1 << 20;

inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline int64_t wanted_tasks(const ConvShape& s) {
  return s.products() < kSerialProducts ? 1 : kTasksPerThread * n_threads_of(pool());
}

// Parts of one memory of a thread, each on a cache line.
class Arena {
 public:
  explicit Arena(std::initializer_list<int64_t> sizes) {
    static thread_local std::vector<float> memory;
    int64_t total = 0;
    for (int64_t n : sizes) total += round_up(n, kLine);
    next_ = thread_memory(memory, static_cast<size_t>(total));
  }
  float* take(int64_t n) {
    float* part = next_;
    next_ += round_up(n, kLine);
    return part;
  }

 private:
  static constexpr int64_t kLine = 16;
  float* next_;
};

// Channels of a group from a word on.
struct Channels {
  int64_t first_word, n_words, first, n;

  Channels(const ConvShape& s, int64_t first_word, int64_t n_words)
      : first_word(first_word),
        n_words(std::min(n_words, s.group_words() - first_word)),
        first(first_word * kWordBits),
        n(std::min(this->n_words * kWordBits, s.group_channels() - first)) {}
};

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

inline const char* element(Dtype dtype, const void* base, int64_t i) {
  return static_cast<const char*>(base) + i * size_of(dtype);
}

}  // namespace bop2nd::gradient
