// SPDX-License-Identifier: Apache-2.0
#include "operators.h"

#include <algorithm>

#include "../core/bit_layout.h"
#include "dispatch.h"
#include "parallel.h"

namespace bop2nd {
void pack(const PackShape& shape, const void* x, uint32_t* signs, uint32_t* mask) {
  const KernelTable& table = active_table();
  auto loop = shape.length_stride == 1 || shape.length == 1 ? table.pack_rows : table.pack_columns;
  int64_t item_words = shape.n_groups * words_for(shape.length);
  parallel_ranges(shape.n_outer * shape.n_inner, row_grain(item_words),
                  [&](int64_t begin, int64_t end) { loop(shape, x, signs, mask, begin, end); });
}

void unpack(const uint32_t* words, int64_t n_rows, int64_t length, Dtype dtype, void* out) {
  const KernelTable& table = active_table();
  parallel_ranges(n_rows, row_grain(words_for(length)), [&](int64_t begin, int64_t end) {
    table.unpack_rows(words, length, dtype, out, begin, end);
  });
}

}  // namespace bop2nd
