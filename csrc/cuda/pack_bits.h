// SPDX-License-Identifier: Apache-2.0
// Between real values and words: sign bits (x < 0), the straight-through estimator's mask (|x| <= 1), back,
// and a mask applied to a gradient. Bodies for the GPU and for the emulated block of tests/cpp.
//
//   flat:    rows are contiguous and whole words: 4 neighbours to a thread, 8 lanes put a word together
//   rows:    the packed axis is contiguous: a lane to an element, a ballot makes the word
//   columns: the packed axis is strided (NCHW): a thread to a word, neighbouring lanes to neighbouring pixels
//
// Cost: fp32 in, 4 bytes read and 1/8 byte (with the mask 1/4) written per element; unpacking the reverse;
// applying a mask reads and writes the element.
// Limits: 2^31 - 1 words.
#pragma once

#include <type_traits>

#include "tile.h"
#include "value.h"

namespace bop2nd::cuda {

// A tensor seen as [outer, inner, groups, length] with element strides; packed along `length`, every group to
// whole words; words are written in that order.
struct PackProblem {
  static constexpr int kThreads = 256, kUnroll = 4;

  enum class Path : int { kFlat, kRows, kColumns };

  const void* x = nullptr;
  Dtype type = Dtype::kFloat32;
  uint32_t* signs = nullptr;
  uint32_t* mask = nullptr;  // or null
  int64_t n_words = 0;       // of all rows
  int64_t outer_stride = 0, inner_stride = 0, group_stride = 0, length_stride = 1;
  int32_t length = 0;
  FastDivide by_row_words, by_groups, by_inner;
  Path path = Path::kRows;

  static PackProblem of(int64_t outer, int64_t inner, int64_t groups, int64_t length_) {
    PackProblem p;
    p.length = static_cast<int32_t>(length_);
    uint32_t row_words = static_cast<uint32_t>(words_for(length_));
    p.n_words = outer * inner * groups * row_words;
    p.by_row_words = FastDivide(row_words < 1 ? 1 : row_words);
    p.by_groups = FastDivide(static_cast<uint32_t>(groups));
    p.by_inner = FastDivide(static_cast<uint32_t>(inner < 1 ? 1 : inner));
    return p;
  }
  // Contiguous rows of whole words, a base aligned for four elements.
  void choose_path() {
    bool contiguous =
        length_stride == 1 && (by_groups.divisor == 1 || group_stride == length) &&
        (by_inner.divisor == 1 || inner_stride == static_cast<int64_t>(by_groups.divisor) * length) &&
        outer_stride == static_cast<int64_t>(by_inner.divisor) * by_groups.divisor * length;
    bool aligned = reinterpret_cast<uintptr_t>(x) % static_cast<uintptr_t>(4 * bytes_of(type)) == 0;
    path = contiguous && aligned && length % kWordBits == 0 ? Path::kFlat
           : length_stride == 1                             ? Path::kRows
                                                            : Path::kColumns;
  }
  int64_t n_blocks() const {
    int64_t per_block =
        path == Path::kColumns ? kThreads : kThreads / (path == Path::kFlat ? 8 : 32) * kUnroll;
    return (n_words + per_block - 1) / per_block;
  }

  struct Word {
    int64_t first_element;
    int n_elements;
  };
  BOP2ND_HD Word word_at(uint32_t index) const {
    uint32_t row = by_row_words.quotient(index), word = index - row * by_row_words.divisor;
    uint32_t pixel = by_groups.quotient(row), group = row - pixel * by_groups.divisor;
    uint32_t outer = by_inner.quotient(pixel), inner = pixel - outer * by_inner.divisor;
    int64_t first = outer * outer_stride + inner * inner_stride + group * group_stride;
    Word at{};
    at.first_element = first + static_cast<int64_t>(word) * kWordBits * length_stride;
    at.n_elements = BitLayout{length}.elements_in(word);
    return at;
  }
};

BOP2ND_HD bool is_negative(float x) { return x < 0.0f; }
BOP2ND_HD bool passes_gradient(float x) { return x <= 1.0f && x >= -1.0f; }

struct PackThread {
  uint32_t signs[PackProblem::kUnroll], mask[PackProblem::kUnroll];
};

template <Dtype kType, class Block>
BOP2ND_HD void pack_flat(Block& block, const PackProblem& p, int64_t index) {
  constexpr int kThreads = PackProblem::kThreads, kUnroll = PackProblem::kUnroll;
  typename Block::template Threads<PackThread, kThreads> threads;
  auto quad_of = [index](int thread, int i) { return (index * kUnroll + i) * kThreads + thread; };
  block.each(threads, [&](int thread, PackThread& t) {
    Float4 x[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      int64_t quad = quad_of(thread, i);
      x[i] = quad < p.n_words * 8 ? load_value4(p.x, kType, quad * 4) : Float4{};
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      uint32_t signs = 0, mask = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        signs |= (is_negative(x[i].v[e]) ? 1u : 0u) << e;
        mask |= (passes_gradient(x[i].v[e]) ? 1u : 0u) << e;
      }
      t.signs[i] = signs << (thread % 8 * 4);
      t.mask[i] = mask << (thread % 8 * 4);
    }
  });
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    block.template or_lanes<8>(threads, [i](PackThread& t) -> uint32_t& { return t.signs[i]; });
    if (p.mask) block.template or_lanes<8>(threads, [i](PackThread& t) -> uint32_t& { return t.mask[i]; });
  }
  block.each(threads, [&](int thread, PackThread& t) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      int64_t quad = quad_of(thread, i);
      if (thread % 8 != 0 || quad >= p.n_words * 8) continue;
      p.signs[quad / 8] = t.signs[i];
      if (p.mask) p.mask[quad / 8] = t.mask[i];
    }
  });
}

template <Dtype kType, class Block>
BOP2ND_HD void pack_rows(Block& block, const PackProblem& p, int64_t index) {
  constexpr int kThreads = PackProblem::kThreads, kUnroll = PackProblem::kUnroll, kWarps = kThreads / 32;
  struct Lane {
    float x[kUnroll];
    bool exists[kUnroll];
  };
  typename Block::template Threads<Lane, kThreads> threads;
  auto word_of = [index](int thread, int i) { return (index * kUnroll + i) * kWarps + thread / 32; };
  block.each(threads, [&](int thread, Lane& t) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      int64_t word = word_of(thread, i);
      t.exists[i] = false;
      t.x[i] = 0.0f;
      if (word >= p.n_words) continue;
      PackProblem::Word at = p.word_at(static_cast<uint32_t>(word));
      t.exists[i] = thread % 32 < at.n_elements;
      if (t.exists[i]) t.x[i] = load_value(p.x, kType, at.first_element + thread % 32);
    }
  });
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    auto store = [&](uint32_t* words, int thread, uint32_t bits) {
      int64_t word = word_of(thread, i);
      if (thread % 32 == 0 && word < p.n_words) words[word] = bits;
    };
    block.ballot(
        threads, [i](int, Lane& t) { return t.exists[i] && is_negative(t.x[i]); },
        [&](int thread, Lane&, uint32_t bits) { store(p.signs, thread, bits); });
    if (!p.mask) continue;
    block.ballot(
        threads, [i](int, Lane& t) { return t.exists[i] && passes_gradient(t.x[i]); },
        [&](int thread, Lane&, uint32_t bits) { store(p.mask, thread, bits); });
  }
}

// Neighbouring threads take neighbouring pixels of the same word, so that reads are coalesced.
template <Dtype kType, class Block>
BOP2ND_HD void pack_columns(Block& block, const PackProblem& p, int64_t index) {
  struct Nothing {};
  typename Block::template Threads<Nothing, PackProblem::kThreads> threads;
  block.each(threads, [&](int thread, Nothing&) {
    int64_t unit = index * PackProblem::kThreads + thread;
    if (unit >= p.n_words) return;
    uint32_t words_per_pixel = p.by_row_words.divisor * p.by_groups.divisor;
    uint32_t rest = p.by_inner.quotient(static_cast<uint32_t>(unit));
    uint32_t inner = static_cast<uint32_t>(unit) - rest * p.by_inner.divisor;
    uint32_t outer = rest / words_per_pixel, word_of_pixel = rest % words_per_pixel;
    uint32_t word = (outer * p.by_inner.divisor + inner) * words_per_pixel + word_of_pixel;
    PackProblem::Word at = p.word_at(word);
    uint32_t signs = 0, mask = 0;
#pragma unroll 8
    for (int e = 0; e < at.n_elements; ++e) {
      float x = load_value(p.x, kType, at.first_element + e * p.length_stride);
      signs |= (is_negative(x) ? 1u : 0u) << e;
      mask |= (passes_gradient(x) ? 1u : 0u) << e;
    }
    p.signs[word] = signs;
    if (p.mask) p.mask[word] = mask;
  });
}

// Words [rows, row_words] beside elements [rows, length], contiguous.
struct UnpackProblem {
  static constexpr int kThreads = 256;

  const uint32_t* words = nullptr;
  void* elements = nullptr;  // unpacking writes +1 / -1; a mask clears where its bit is 0
  Dtype type = Dtype::kFloat32;
  int64_t n_rows = 0, length = 0;

  BOP2ND_HD bool quads() const {  // four elements to a thread, one access
    uintptr_t quad_bytes = static_cast<uintptr_t>(4 * bytes_of(type));
    return length % 4 == 0 && reinterpret_cast<uintptr_t>(elements) % quad_bytes == 0;
  }
  BOP2ND_HD int64_t n_units() const { return n_rows * length / (quads() ? 4 : 1); }
  int64_t n_blocks() const { return (n_units() + kThreads - 1) / kThreads; }

  // The bits of the elements from `element` on (up to the end of their word), lowest first.
  BOP2ND_HD uint32_t bits_at(int64_t element) const {
    int64_t row = 0, column = element;
    if (length % kWordBits != 0) {  // else the words of all rows are one long row
      bool small = element < (int64_t{1} << 32) && length < (int64_t{1} << 32);
      row = small ? static_cast<uint32_t>(element) / static_cast<uint32_t>(length) : element / length;
      column = element - row * length;
    }
    return words[row * words_for(length) + column / kWordBits] >> (column % kWordBits);
  }
};

template <Dtype kType, class Block>
BOP2ND_HD void unpack_block(Block& block, const UnpackProblem& p, int64_t index) {
  struct Nothing {};
  typename Block::template Threads<Nothing, UnpackProblem::kThreads> threads;
  block.each(threads, [&](int thread, Nothing&) {
    int64_t unit = index * UnpackProblem::kThreads + thread;
    if (unit >= p.n_units()) return;
    int64_t element = unit * (p.quads() ? 4 : 1);
    uint32_t bits = p.bits_at(element);
    if (p.quads()) {
      Float4 x;
#pragma unroll
      for (int i = 0; i < 4; ++i) x.v[i] = (bits >> i) & 1u ? -1.0f : 1.0f;
      store_value4(p.elements, kType, element, x);
    } else {
      store_value(p.elements, kType, element, bits & 1u ? -1.0f : 1.0f);
    }
  });
}

// Elements are moved as they are, so that what stays keeps its bits. Quad: Word4 or Half4.
template <class Quad, class Block>
BOP2ND_HD void mask_block(Block& block, const UnpackProblem& p, int64_t index) {
  using Element = std::remove_reference_t<decltype(Quad{}.v[0])>;
  struct Nothing {};
  typename Block::template Threads<Nothing, UnpackProblem::kThreads> threads;
  block.each(threads, [&](int thread, Nothing&) {
    int64_t unit = index * UnpackProblem::kThreads + thread;
    if (unit >= p.n_units()) return;
    int64_t element = unit * (p.quads() ? 4 : 1);
    uint32_t bits = p.bits_at(element);
    if (p.quads()) {
      Quad* at = static_cast<Quad*>(p.elements) + unit;
      Quad x = *at;
#pragma unroll
      for (int i = 0; i < 4; ++i) x.v[i] = (bits >> i) & 1u ? x.v[i] : Element{0};
      if (~bits & 15u) *at = x;
    } else if (!(bits & 1u)) {
      static_cast<Element*>(p.elements)[element] = 0;
    }
  });
}

}  // namespace bop2nd::cuda
