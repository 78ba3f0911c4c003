// SPDX-License-Identifier: Apache-2.0
// The operators of training that are neither products nor gradients, and the loops that only training has.
#include <algorithm>

#include "../core/bit_layout.h"
#include "isa_tables.h"
#include "operators.h"
#include "parallel.h"

namespace bop2nd {
namespace {

#define BOP2ND_MAKER(name, training, code, needs, text) BOP2ND_IF_##code(training##_training),
constexpr Makers<TrainingTable> kMakers = {BOP2ND_INSTRUCTION_SETS(BOP2ND_MAKER)};
#undef BOP2ND_MAKER

void add_to(int64_t* counter, int64_t n) { __atomic_fetch_add(counter, n, __ATOMIC_RELAXED); }

}  // namespace

const TrainingTable* training_of(int id) {
  static const std::array<TrainingTable, kIsaCount> tables = make_all<TrainingTable>(kMakers);
  return bop2nd_isa_supported(id) ? &tables[static_cast<size_t>(id)] : nullptr;
}

const TrainingTable& active_training() {
  active_table();
  return *training_of(bop2nd_isa_active());
}

void bop_step(const std::vector<StepOperand>& tensors, const StepHyper& hyper, int64_t* counts) {
  const TrainingTable& table = active_training();
  std::vector<StepOperand> walked = tensors;
  std::vector<int64_t> first(tensors.size() + 1, 0);  // of each tensor in the concatenation of all, in words
  for (size_t i = 0; i < walked.size(); ++i) {
    StepOperand& t = walked[i];
    if (t.length % kWordBits == 0) t.length *= t.rows, t.rows = 1;
    first[i + 1] = first[i] + t.rows * words_for(t.length);
    counts[2 * i] = counts[2 * i + 1] = 0;
  }
  parallel_ranges(first.back(), kWordGrain, [&](int64_t begin, int64_t end) {
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

void apply_mask(const uint32_t* mask, int64_t n_rows, int64_t length, Dtype dtype, void* grad) {
  const TrainingTable& table = active_training();
  parallel_ranges(n_rows, row_grain(words_for(length)), [&](int64_t begin, int64_t end) {
    table.apply_mask(mask, length, dtype, grad, begin, end);
  });
}

}  // namespace bop2nd
