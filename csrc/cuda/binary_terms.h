// SPDX-License-Identifier: Apache-2.0
// The parts of a binary dot product that do not depend on the pair (pixel, output), computed once:
//
//   column_terms[class, o] = K (- 2 popc(w_o), AND only) + (1 - p) * sum over padded taps of (2 P(o, tap) -
//   C_g) pixel_counts[pixel, group] = popc of the group's words (AND only)
//
// p is the padding value, P the number of -1 in a tap; see conv_view.h and fragment.h for why.
// One launch: block b < outputs does output b, the others 16 rows of words each.
// Cost: weights and image read once more, no atomics; for a 3x3 layer of 256 channels 1/1000 of the product.
// Limits: none of its own; a kernel's taps are counted 1024 at a time.
#pragma once

#include "conv_view.h"

namespace bop2nd::cuda {

struct TermsProblem {
  const uint32_t* x = nullptr;
  const uint32_t* w = nullptr;
  ConvView shape;
  int n_classes = 1;
  bool subtract_popcounts = false;  // AND
  bool vectors = false;             // groups are whole vectors of four words, aligned
  int32_t* column_terms = nullptr;
  int32_t* pixel_counts = nullptr;

  static constexpr int kThreads = 128, kLanesPerRow = 8, kRowsPerBlock = kThreads / kLanesPerRow;
  static constexpr int kChunkTaps = 1024, kSharedBytes = kChunkTaps * 4;

  BOP2ND_HD int64_t n_pixel_rows() const {
    return static_cast<int64_t>(shape.n_images) * shape.vertical.size * shape.horizontal.size * shape.groups;
  }
  BOP2ND_HD int64_t n_blocks() const {
    int64_t rows = subtract_popcounts ? (n_pixel_rows() + kRowsPerBlock - 1) / kRowsPerBlock : 0;
    return shape.n_outputs() + rows;
  }
};
static_assert(TermsProblem::kSharedBytes <= 48 * 1024, "more would have to be asked for");

// What some taps add to the term of a class; counts[tap - first] of them in `parts` parts.
BOP2ND_HD int chunk_term(const TermsProblem& p, int border_class, const int32_t* counts, int first, int taps,
                         int parts) {
  const ConvView& s = p.shape;
  Pixel pixel = s.pixel_of_class(border_class);
  int term = 0;
  for (int i = 0; i < taps; ++i) {
    int negative = 0;
    for (int part = 0; part < parts; ++part) negative += counts[i * parts + part];
    int ky = (first + i) / s.horizontal.kernel, kx = (first + i) % s.horizontal.kernel;
    if (p.subtract_popcounts) term -= 2 * negative;
    bool padded = p.n_classes > 1 && s.input_pixel(pixel, ky, kx) < 0;
    if (padded) term += (1 - s.padding_value) * (2 * negative - s.group_channels);
  }
  return term;
}

// -1s among the words lane, lane + lanes, ... of n; whole vectors of four words where that may be.
template <class Block>
BOP2ND_HD int count_negative(Block& block, const uint32_t* words, int n, int lane, int lanes, bool vectors) {
  int count = 0;
  if (vectors) {
    for (int k = lane * 4; k < n; k += lanes * 4) {
      uint32_t four[4];
      block.template load_words<4>(four, words + k);
#pragma unroll
      for (int i = 0; i < 4; ++i) count += block.popcount(four[i]);
    }
  } else {
    for (int k = lane; k < n; k += lanes) count += block.popcount(words[k]);
  }
  return count;
}

// A warp counts a tap, or a part of one where there are fewer taps than warps. Taps come in chunks, so that
// any kernel fits the shared memory; the terms of a class belong to one thread, which adds to them in global
// memory.
template <class Block>
BOP2ND_HD void column_term_block(Block& block, const TermsProblem& p, int output) {
  constexpr int kThreads = TermsProblem::kThreads, kWarps = kThreads / 32, kChunk = TermsProblem::kChunkTaps;
  const ConvView& s = p.shape;
  typename Block::template Threads<int32_t, kThreads> threads;
  int32_t* counts = block.template shared<int32_t>(0);  // -1s per tap and part
  int parts = s.n_taps() < kWarps ? kWarps / s.n_taps() : 1;
  const uint32_t* words = p.w + static_cast<int64_t>(output) * s.k_words();
  for (int first = 0; first < s.n_taps(); first += kChunk) {
    int taps = s.n_taps() - first < kChunk ? s.n_taps() - first : kChunk, n_units = taps * parts;
    for (int unit0 = 0; unit0 < n_units; unit0 += kWarps) {
      block.each(threads, [&](int thread, int32_t& count) {
        int unit = unit0 + thread / 32, tap = first + unit / parts;
        int lane = unit % parts * 32 + thread % 32;
        count = unit < n_units ? count_negative(block, words + static_cast<int64_t>(tap) * s.group_words,
                                                s.group_words, lane, parts * 32, p.vectors)
                               : 0;
      });
      block.template sum_lanes<32>(threads, [](int32_t& count) -> int32_t& { return count; });
      block.each(threads, [&](int thread, int32_t& count) {
        int unit = unit0 + thread / 32;
        if (thread % 32 == 0 && unit < n_units) counts[unit] = count;
      });
    }
    block.sync();
    block.each(threads, [&](int thread, int32_t&) {
      for (int c = thread; c < p.n_classes; c += kThreads) {
        int32_t* term = p.column_terms + static_cast<int64_t>(c) * s.n_outputs() + output;
        *term = (first == 0 ? s.k_elements() : *term) + chunk_term(p, c, counts, first, taps, parts);
      }
    });
    if (first + kChunk < s.n_taps()) block.sync();  // before the next chunk overwrites the counts
  }
}

template <class Block>
BOP2ND_HD void pixel_count_block(Block& block, const TermsProblem& p, int64_t row_block) {
  constexpr int kThreads = TermsProblem::kThreads, kLanes = TermsProblem::kLanesPerRow;
  typename Block::template Threads<int32_t, kThreads> counts;
  int n_words = p.shape.group_words;
  block.each(counts, [&](int thread, int32_t& count) {
    int64_t row = row_block * TermsProblem::kRowsPerBlock + thread / kLanes;
    count = row < p.n_pixel_rows()
                ? count_negative(block, p.x + row * n_words, n_words, thread % kLanes, kLanes, p.vectors)
                : 0;
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
