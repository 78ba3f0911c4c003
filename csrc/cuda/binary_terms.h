// SPDX-License-Identifier: Apache-2.0
// The parts of a binary dot product that do not depend on the pair (pixel, output), computed once:
//
//   column_terms[class, o] = K (- 2 popc(w_o), AND only) + (1 - p) * sum over padded taps of (2 P(o, tap) -
//   C_g) pixel_counts[pixel, group] = popc of the group's words (AND only)
//
// p is the padding value, P the number of -1 in a tap; see conv_shape.h and fragment.h for why.
// One launch: block b < outputs does output b, the others 16 rows of words each.
// Cost: weights and image read once; for a 3x3 layer of 256 channels 1/1000 of the product's work.
#pragma once

#include "conv_shape.h"

namespace bop2nd::cuda {

struct TermsProblem {
  const uint32_t* x = nullptr;
  const uint32_t* w = nullptr;
  ConvShape shape;
  int padding_value = 1;
  int n_classes = 1;
  bool subtract_popcounts = false;  // AND
  int32_t* column_terms = nullptr;
  int32_t* pixel_counts = nullptr;

  static constexpr int kThreads = 128, kLanesPerRow = 8, kRowsPerBlock = kThreads / kLanesPerRow;

  BOP2ND_HD int64_t n_pixel_rows() const {
    return static_cast<int64_t>(shape.n_images) * shape.vertical.size * shape.horizontal.size * shape.groups;
  }
  BOP2ND_HD int64_t n_blocks() const {
    int64_t rows = subtract_popcounts ? (n_pixel_rows() + kRowsPerBlock - 1) / kRowsPerBlock : 0;
    return shape.n_outputs() + rows;
  }
  BOP2ND_HD int shared_bytes() const { return (shape.n_taps() + 1) * 4; }
};

template <class Block>
BOP2ND_HD void column_term_block(Block& block, const TermsProblem& p, int output) {
  constexpr int kThreads = TermsProblem::kThreads;
  const ConvShape& s = p.shape;
  struct Nothing {};
  typename Block::template Threads<Nothing, kThreads> threads;
  int32_t* counts = block.template shared<int32_t>(0);  // -1s per tap
  block.each(threads, [&](int thread, Nothing&) {
    for (int tap = thread; tap < s.n_taps(); tap += kThreads) counts[tap] = 0;
  });
  block.sync();
  block.each(threads, [&](int thread, Nothing&) {
    const uint32_t* words = p.w + static_cast<int64_t>(output) * s.k_words();
    for (int k = thread; k < s.k_words(); k += kThreads) {
      block.atomic_add(counts + s.by_group_words.quotient(static_cast<uint32_t>(k)),
                       block.popcount(words[k]));
    }
  });
  block.sync();
  block.each(threads, [&](int thread, Nothing&) {
    for (int c = thread; c < p.n_classes; c += kThreads) {
      Pixel pixel = s.pixel_of_class(c);
      int term = s.k_elements();
      for (int tap = 0; tap < s.n_taps(); ++tap) {
        int ky = tap / s.horizontal.kernel, kx = tap % s.horizontal.kernel;
        if (p.subtract_popcounts) term -= 2 * counts[tap];
        bool padded = p.n_classes > 1 && s.input_pixel(pixel, ky, kx) < 0;
        if (padded) term += (1 - p.padding_value) * (2 * counts[tap] - s.group_channels);
      }
      p.column_terms[static_cast<int64_t>(c) * s.n_outputs() + output] = term;
    }
  });
}

template <class Block>
BOP2ND_HD void pixel_count_block(Block& block, const TermsProblem& p, int64_t row_block) {
  constexpr int kThreads = TermsProblem::kThreads, kLanes = TermsProblem::kLanesPerRow;
  typename Block::template Threads<int32_t, kThreads> counts;
  block.each(counts, [&](int thread, int32_t& count) {
    int64_t row = row_block * TermsProblem::kRowsPerBlock + thread / kLanes;
    count = 0;
    if (row >= p.n_pixel_rows()) return;
    const uint32_t* words = p.x + row * p.shape.group_words;
    for (int k = thread % kLanes; k < p.shape.group_words; k += kLanes) count += block.popcount(words[k]);
  });
  block.template sum_lanes<kLanes>(counts, [](int32_t& count) -> int32_t& { return count; });
  block.each(counts, [&](int thread, int32_t& count) {
    int64_t row = row_block * TermsProblem::kRowsPerBlock + thread / kLanes;
    if (thread % kLanes == 0 && row < p.n_pixel_rows()) p.pixel_counts[row] = count;
  });
}

template <class Block>
BOP2ND_HD void terms_block(Block& block, const TermsProblem& p, int64_t index) {
  if (index < p.shape.n_outputs()) {
    column_term_block(block, p, static_cast<int>(index));
  } else {
    pixel_count_block(block, p, index - p.shape.n_outputs());
  }
}

}  // namespace bop2nd::cuda
