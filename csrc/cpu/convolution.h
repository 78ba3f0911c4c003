// SPDX-License-Identifier: Apache-2.0
// What the two ways to compute a binary convolution share: by counting bits (convolution.cpp), by multiplying
// tiles of bytes (tile_convolution.cpp).
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "operators.h"
#include "scratch.h"

namespace bop2nd {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory of a thread that starts on a cache line and keeps what it has grown to.
template <class T>
T* thread_memory(std::vector<T>& memory, size_t n) {
  constexpr size_t kLine = 64 / sizeof(T);
  if (memory.size() < n + kLine) memory.resize(n + kLine);
  size_t past_line = reinterpret_cast<uintptr_t>(memory.data()) / sizeof(T) % kLine;
  return memory.data() + (kLine - past_line) % kLine;
}

// Whether tiles pay: unpacking weights to bytes costs as much as counting the bits of about 8 pixels. And
// whether what a row of the output looks at fits into some memory.
bool tiles_pay(const ConvShape& shape);
// Words of a sum that lie side by side in the bytes of a pixel, as chunks of one or two.
void add_chunks(ScratchVector<TileChunk>& chunks, int64_t x_offset, int64_t first_word, int64_t n_words);
void tile_conv(const TileTable& table, const ConvShape& shape, const uint32_t* x, const uint32_t* blocked,
               const Epilogue& to);

}  // namespace bop2nd
