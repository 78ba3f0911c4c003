// SPDX-License-Identifier: Apache-2.0
#include "operators.h"

#include <algorithm>

#include "../core/bit_layout.h"
#include "dispatch.h"
#include "parallel.h"

namespace bop2nd {
namespace {

// At least this many words (of 32 elements) per thread: below, waking a thread costs more than it saves.
constexpr int64_t kStepGrain = 1024;
constexpr int64_t kPackGrain = 1024;

void add_to(int64_t* counter, int64_t n) { __atomic_fetch_add(counter, n, __ATOMIC_RELAXED); }

int64_t grain_for(int64_t words, int64_t words_per_item) {
  return std::max<int64_t>(1, words / std::max<int64_t>(1, words_per_item));
}

}  // namespace

void bop_step(const std::vector<StepTensor>& tensors, const StepHyper& hyper, int64_t* counts) {
  const KernelTable& table = active_table();
  std::vector<StepTensor> walked = tensors;
  std::vector<int64_t> first(tensors.size() + 1, 0);  // of each tensor in the concatenation of all, in words
  for (size_t i = 0; i < walked.size(); ++i) {
    StepTensor& t = walked[i];
    if (t.length % kWordBits == 0) t.length *= t.rows, t.rows = 1;
    first[i + 1] = first[i] + t.rows * words_for(t.length);
    counts[2 * i] = counts[2 * i + 1] = 0;
  }
  parallel_ranges(first.back(), kStepGrain, [&](int64_t begin, int64_t end) {
    size_t i = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
    for (; begin < end; ++i) {
      int64_t stop = std::min(end, first[i + 1]);
      if (stop == begin) continue;
      StepCounts sum{};
      table.step(walked[i], hyper, begin - first[i], stop - begin, &sum);
      add_to(counts + 2 * i, sum.candidates);
      add_to(counts + 2 * i + 1, sum.flips);
      begin = stop;
    }
  });
}

void pack(const PackShape& shape, const void* x, uint32_t* signs, uint32_t* mask) {
  const KernelTable& table = active_table();
  auto loop = shape.length_stride == 1 || shape.length == 1 ? table.pack_rows : table.pack_columns;
  int64_t item_words = shape.n_groups * words_for(shape.length);
  parallel_ranges(shape.n_outer * shape.n_inner, grain_for(kPackGrain, item_words),
                  [&](int64_t begin, int64_t end) { loop(shape, x, signs, mask, begin, end); });
}

void unpack(const uint32_t* words, int64_t n_rows, int64_t length, Dtype dtype, void* out) {
  const KernelTable& table = active_table();
  parallel_ranges(n_rows, grain_for(kPackGrain, words_for(length)), [&](int64_t begin, int64_t end) {
    table.unpack_rows(words, length, dtype, out, begin, end);
  });
}

void apply_mask(const uint32_t* mask, int64_t n_rows, int64_t length, Dtype dtype, void* grad) {
  const KernelTable& table = active_table();
  parallel_ranges(n_rows, grain_for(kPackGrain, words_for(length)), [&](int64_t begin, int64_t end) {
    table.apply_mask(mask, length, dtype, grad, begin, end);
  });
}

}  // namespace bop2nd
