// SPDX-License-Identifier: Apache-2.0
// Binary convolutions and linear layers against a plain loop over bits.
#include "check.h"
#include "core/bit_layout.h"
#include "cpu/dispatch.h"
#include "core/half_float.h"
#include "cpu/operators.h"

using namespace bop2nd;

struct Operands {
  std::vector<uint32_t> x, w, blocked;
};

std::vector<uint32_t> random_rows(Random& random, int64_t rows, int64_t length) {
  std::vector<uint32_t> words(static_cast<size_t>(rows * words_for(length)));
  BitLayout row{length};
  for (size_t i = 0; i < words.size(); ++i) {
    words[i] = random.word() & low_bits(row.elements_in(static_cast<int64_t>(i) % row.row_words()));
  }
  return words;
}

int sign_at(const std::vector<uint32_t>& words, int64_t row, int64_t row_words, int64_t e) {
  uint32_t word = words[static_cast<size_t>(row * row_words + BitLayout::word_of(e))];
  return (word >> BitLayout::bit_of(e)) & 1 ? -1 : 1;
}

int32_t plain_dot(const ConvShape& s, const Operands& o, int64_t n, int64_t oy, int64_t ox, int64_t out) {
  int64_t g = out / s.group_outputs(), words = s.group_words();
  int32_t sum = 0;
  for (int64_t i = 0; i < s.kernel[0]; ++i) {
    for (int64_t j = 0; j < s.kernel[1]; ++j) {
      int64_t y = oy * s.stride[0] - s.padding[0] + i * s.dilation[0];
      int64_t x = ox * s.stride[1] - s.padding[1] + j * s.dilation[1];
      bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
      for (int64_t c = 0; c < s.group_channels(); ++c) {
        int value = s.padding_value;
        if (inside) value = sign_at(o.x, ((n * s.height + y) * s.width + x) * s.groups + g, words, c);
        sum += value * sign_at(o.w, out * s.taps() + i * s.kernel[1] + j, words, c);
      }
    }
  }
  return sum;
}

// `e` says what is computed; values and signs are asked for as told.
template <class T>
void check_outputs(const char* isa, const ConvShape& s, const Operands& o, const std::vector<int32_t>& want,
                   Epilogue e, Dtype dtype, bool values, bool signs) {
  int64_t n = s.out_channels, words = words_for(n), pixels = n ? static_cast<int64_t>(want.size()) / n : 0;
  Guarded<T> out(want.size());
  Guarded<uint32_t> bits(static_cast<size_t>(pixels * words));
  std::vector<T> residual;
  for (size_t i = 0; i < want.size(); ++i)
    residual.push_back(from_float<T>(0.37f * static_cast<float>(i % 13) - 2));
  e.dtype = dtype;
  if (values) e.values = out.data();
  if (signs) e.signs = bits.data();
  if (e.residual) e.residual = residual.data();
  binary_conv(s, o.x.data(), o.blocked.data(), e);
  out.check_guards(isa);
  bits.check_guards(isa);
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t i = 0; i < words * kWordBits; ++i) {
      size_t at = static_cast<size_t>(p * n + i);
      float value = i < n ? finish(e, want[at], i, to_float(residual[at])) : 0.0f;
      if (i < n && values) {
        CHECK(to_float(out[p * n + i]) == to_float(from_float<T>(value)), "%s value %zu", isa, at);
      }
      if (!signs) continue;
      bool negative = i < n && is_negative(e, want[at], value, i);
      CHECK(((bits[p * words + BitLayout::word_of(i)] >> BitLayout::bit_of(i)) & 1) == (negative ? 1u : 0u),
            "%s bit %ld of pixel %ld", isa, (long)i, (long)p);
    }
  }
}

void check_epilogues(const char* isa, const ConvShape& s, const Operands& o,
                     const std::vector<int32_t>& want) {
  Random random;
  std::vector<int32_t> threshold;
  std::vector<float> scale, shift;
  for (int64_t i = 0; i < s.out_channels; ++i) {
    threshold.push_back(static_cast<int32_t>(random.below(13)) - 6);
    scale.push_back(0.1f * static_cast<float>(random.below(19)) - 0.9f);
    shift.push_back(0.3f * static_cast<float>(random.below(7)) - 1.0f);
  }
  Epilogue plain, limits, affine, both;
  limits.threshold = both.threshold = threshold.data();
  affine.scale = both.scale = scale.data();
  affine.shift = shift.data();
  Epilogue added = affine;
  added.residual = &added;  // any address: check_outputs gives it the right type
  check_outputs<float>(isa, s, o, want, plain, Dtype::kFloat32, true, false);
  check_outputs<BFloat16>(isa, s, o, want, plain, Dtype::kBFloat16, true, false);
  check_outputs<Float16>(isa, s, o, want, plain, Dtype::kFloat16, true, false);
  check_outputs<float>(isa, s, o, want, limits, Dtype::kFloat32, false, true);
  check_outputs<float>(isa, s, o, want, affine, Dtype::kFloat32, false, true);
  check_outputs<BFloat16>(isa, s, o, want, both, Dtype::kBFloat16, true, true);
  check_outputs<float>(isa, s, o, want, added, Dtype::kFloat32, true, true);
  check_outputs<BFloat16>(isa, s, o, want, added, Dtype::kBFloat16, true, true);
  check_outputs<Float16>(isa, s, o, want, added, Dtype::kFloat16, true, false);
  Epilogue whole = added, rectified;
  whole.low = -5, whole.high = 6;
  whole.slope = shift.data(), whole.post_shift = scale.data(), whole.sign_shift = shift.data();
  rectified.low = -3, rectified.relu = true;
  check_outputs<float>(isa, s, o, want, whole, Dtype::kFloat32, true, true);
  check_outputs<BFloat16>(isa, s, o, want, whole, Dtype::kBFloat16, true, true);
  check_outputs<float>(isa, s, o, want, rectified, Dtype::kFloat32, true, false);
}

void check_conv(const char* isa, const ConvShape& s) {
  Random random;
  Operands o;
  o.x = random_rows(random, s.batch * s.height * s.width * s.groups, s.group_channels());
  o.w = random_rows(random, s.out_channels * s.taps(), s.group_channels());
  int64_t row_words = s.taps() * s.group_words();
  o.blocked.assign(static_cast<size_t>(s.groups * s.group_blocks() * row_words * 16), 0xA5A5A5A5u);
  prepack_weight(o.w.data(), s.out_channels, s.groups, row_words, o.blocked.data());
  std::vector<int32_t> want;
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t y = 0; y < s.out_size(0); ++y) {
      for (int64_t x = 0; x < s.out_size(1); ++x) {
        for (int64_t out = 0; out < s.out_channels; ++out) want.push_back(plain_dot(s, o, n, y, x, out));
      }
    }
  }
  check_epilogues(isa, s, o, want);
}

// Counts that come close to the limits of their registers: every bit differs.
void check_all_different(const char* isa, int64_t rows, int64_t features) {
  constexpr int64_t kOutputs = 107;  // lanes of 8, 16 and 32 bits
  ConvShape s{.batch = rows, .channels = features, .out_channels = kOutputs};
  std::vector<uint32_t> x(static_cast<size_t>(rows * s.group_words()), ~0u);
  for (int64_t m = 0; m < rows; ++m) {
    x[static_cast<size_t>((m + 1) * s.group_words() - 1)] =
        low_bits(BitLayout{features}.elements_in(s.group_words() - 1));
  }
  std::vector<uint32_t> blocked(static_cast<size_t>(s.group_blocks() * s.group_words() * 16), 0);
  Guarded<float> out(static_cast<size_t>(rows * kOutputs));
  Epilogue to;
  to.values = out.data();
  binary_conv(s, x.data(), blocked.data(), to);
  out.check_guards(isa);
  for (int64_t i = 0; i < rows * kOutputs; ++i)
    CHECK(out[i] == static_cast<float>(-features), "%s %ld features", isa, (long)features);
}

// From 4 pixels on AVX2 and NEON with UDOT look up: packed are offsets of tables, here of the one for two
// pixels of only ones, in units of 8 bytes or in bytes.
void check_lookups_run(const char* isa, uint32_t offsets) {
  const KernelTable* table = table_of(id_of(isa));
  if (!table) return;
  std::vector<uint32_t> image(4, ~0u);
  int64_t first_word[4] = {0, 1, 2, 3};
  int32_t run_offset = 0;
  for (int64_t n : {3, 4}) {
    for (int lane_bits : {8, 16, 32}) {
      std::vector<uint32_t> slices(4 * 4 * (2 + 1) + 16, 0);
      table->pack_pixels({.image = image.data(),
                          .first_word = first_word,
                          .n_pixels = n,
                          .run_offset = &run_offset,
                          .n_runs = 1,
                          .run_words = 1,
                          .x_words = 2,
                          .lane_bits = lane_bits,
                          .slices = slices.data()});
      bool looked_up = n == 4 && lane_bits < 32;
      CHECK((slices[0] == offsets) == looked_up, "%s, %ld pixels, lanes of %d bits: %x", isa, (long)n,
            lane_bits, slices[0]);
    }
  }
}

int main() {
  check_lookups_run("avx2", 0x01FE01FEu);
  check_lookups_run("neon_dot", 0x0FF00FF0u);
  on_every_instruction_set([](const char* isa) {
    for (int64_t features : {0, 1, 31, 32, 33, 63, 64, 65, 511, 512, 513, 1031, 4096}) {
      for (int64_t rows : {1, 2, 3, 5, 70}) {
        check_conv(isa, {rows, 1, 1, features, 1, rows % 2 ? 16 : 107, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 0});
      }
    }
    for (int64_t outputs : {27, 64, 91}) {  // blocks of 32 and 64 that are full and that are not
      for (int64_t features : {96, 1300})
        check_conv(isa, {7, 1, 1, features, 1, outputs, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 0});
    }
    for (int pad : {0, 1, -1}) {
      check_conv(isa, {2, 5, 6, 64, 1, 32, {3, 3}, {1, 1}, {1, 1}, {1, 1}, pad});
      check_conv(isa, {1, 9, 8, 70, 2, 20, {3, 3}, {2, 1}, {1, 2}, {1, 1}, pad});
      check_conv(isa, {1, 9, 9, 33, 1, 50, {5, 5}, {1, 1}, {2, 2}, {1, 1}, pad});
      check_conv(isa, {1, 11, 12, 32, 1, 5, {7, 7}, {2, 2}, {3, 3}, {1, 1}, pad});
      check_conv(isa, {2, 7, 7, 96, 3, 96, {3, 3}, {1, 1}, {2, 2}, {2, 2}, pad});
      check_conv(isa, {1, 2, 1, 40, 1, 16, {5, 5}, {1, 1}, {2, 2}, {1, 1}, pad});
      check_conv(isa, {1, 2, 2, 32, 1, 33, {1, 1}, {1, 1}, {3, 4}, {1, 1}, pad});
      check_conv(isa, {1, 3, 3, 32, 1, 16, {4, 4}, {1, 1}, {0, 0}, {1, 1}, pad});
      check_conv(isa, {0, 3, 3, 32, 1, 16, {3, 3}, {1, 1}, {1, 1}, {1, 1}, pad});
    }
    for (int64_t rows : {3, 5}) {
      for (int64_t rounds : {31, 32, 62, 63}) {
        for (int64_t more : {-1, 0, 1, 77}) check_all_different(isa, rows, 32 * 16 * rounds + more);
      }
    }
  });
}
