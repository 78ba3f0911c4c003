// SPDX-License-Identifier: Apache-2.0
// Signs times real numbers and 8-bit integers: integers against a plain loop, real sums to the bit against
// the plainest instruction set, and near to sums in double.
#include <cmath>

#include "check.h"
#include "core/bit_layout.h"
#include "cpu/operators.h"
#include "cpu/signed_product.h"

using namespace bop2nd;

struct Case {
  ConvShape shape;
  std::vector<float> reals;
  std::vector<uint8_t> bytes;
  std::vector<uint32_t> w, blocked;
  std::vector<double> want[3];     // by SignedInput
  std::vector<float> of_plainest;  // of real inputs

  explicit Case(const ConvShape& s) : shape(s) {
    Random random;
    for (int64_t i = 0; i < s.batch * s.height * s.width * s.channels; ++i) {
      reals.push_back(static_cast<float>(random.below(4001) - 2000) / 977.0f);
      bytes.push_back(static_cast<uint8_t>(random.below(256)));
    }
    BitLayout row{s.group_channels()};
    for (int64_t i = 0; i < s.out_channels * s.taps() * s.group_words(); ++i)
      w.push_back(random.word() & low_bits(row.elements_in(i % s.group_words())));
    blocked.assign(static_cast<size_t>(s.groups * s.group_blocks() * s.taps() * s.group_words() * 16), 0);
    prepack_weight(w.data(), s.out_channels, s.groups, s.taps() * s.group_words(), blocked.data());
    for (int input = 0; input < 3; ++input) want[input] = plain(static_cast<SignedInput>(input));
  }

  double value(SignedInput input, int64_t at) const {
    uint8_t byte = bytes[static_cast<size_t>(at)];
    if (input == SignedInput::kReal) return static_cast<double>(reals[static_cast<size_t>(at)]);
    return input == SignedInput::kInt8 ? static_cast<int8_t>(byte) : 2.0 * byte - 37.0;
  }

  std::vector<double> plain(SignedInput input) const {
    const ConvShape& s = shape;
    std::vector<double> sums;
    for (int64_t pixel = 0; pixel < s.out_pixels(); ++pixel) {
      int64_t ox = pixel % s.out_size(1), oy = pixel / s.out_size(1) % s.out_size(0),
              n = pixel / s.out_size(1) / s.out_size(0);
      for (int64_t o = 0; o < s.out_channels; ++o) {
        int64_t group = o / s.group_outputs();
        double sum = 0;
        for (int64_t tap = 0; tap < s.taps(); ++tap) {
          int64_t y = oy * s.stride[0] - s.padding[0] + tap / s.kernel[1] * s.dilation[0];
          int64_t x = ox * s.stride[1] - s.padding[1] + tap % s.kernel[1] * s.dilation[1];
          if (y < 0 || y >= s.height || x < 0 || x >= s.width) continue;
          for (int64_t c = 0; c < s.group_channels(); ++c) {
            int64_t at = ((n * s.height + y) * s.width + x) * s.channels + group * s.group_channels() + c;
            uint32_t word =
                w[static_cast<size_t>((o * s.taps() + tap) * s.group_words() + BitLayout::word_of(c))];
            sum += (word >> BitLayout::bit_of(c)) & 1 ? -value(input, at) : value(input, at);
          }
        }
        sums.push_back(sum);
      }
    }
    return sums;
  }

  void check(const char* isa, SignedInput input, bool laid) {
    const ConvShape& s = shape;
    const std::vector<double>& wanted = want[static_cast<int>(input)];
    Guarded<float> out(wanted.size());
    SignedProduct p{};
    p.shape = s, p.input = input;
    p.x = input == SignedInput::kReal ? static_cast<const void*>(reals.data()) : bytes.data();
    p.channel_stride = 1, p.column_stride = s.channels, p.row_stride = s.width * s.channels;
    p.image_stride = s.height * p.row_stride;
    p.multiplier = input == SignedInput::kUint8 ? 2 : 1, p.zero_point = input == SignedInput::kUint8 ? 37 : 0;
    p.w = w.data(), p.blocked = laid ? blocked.data() : nullptr;
    p.to.values = out.data();
    signed_product(p);
    out.check_guards(isa);
    if (input == SignedInput::kReal && of_plainest.empty())
      of_plainest.assign(out.data(), out.data() + out.size());
    double bound = 1e-5 * static_cast<double>(s.taps() * s.group_channels() + 1);
    for (size_t i = 0; i < wanted.size(); ++i) {
      float got = out[static_cast<int64_t>(i)];
      if (input == SignedInput::kReal) {
        CHECK(std::fabs(static_cast<double>(got) - wanted[i]) < bound, "%s: %g, not %g", isa,
              static_cast<double>(got), wanted[i]);
        CHECK(got == of_plainest[i], "%s: %.9g, not %.9g", isa, static_cast<double>(got),
              static_cast<double>(of_plainest[i]));
      } else {
        CHECK(static_cast<double>(got) == wanted[i], "%s: %g, not %g at %zu", isa, static_cast<double>(got),
              wanted[i], i);
      }
    }
  }
};

void check_quantizing(const char* isa) {
  Random random;
  std::vector<float> x;
  for (int i = 0; i < 3 * 77; ++i) x.push_back(static_cast<float>(random.below(2001) - 1000) / 7.0f);
  Guarded<int8_t> q(x.size());
  float scale[3];
  CHECK(quantize_rows(Dtype::kFloat32, x.data(), 3, 77, true, q.data(), scale) == 0, "%s", isa);
  q.check_guards(isa);
  for (int row = 0; row < 3; ++row) {
    float most = 0;
    for (int i = 0; i < 77; ++i) most = std::fmax(most, std::fabs(x[static_cast<size_t>(row * 77 + i)]));
    CHECK(scale[row] == most / 127.0f, "%s scale %d", isa, row);
    for (int i = row * 77; i < row * 77 + 77; ++i) {
      float rounded = std::nearbyint(x[static_cast<size_t>(i)] / scale[row]);
      CHECK(static_cast<float>(q[i]) == std::fmin(127.0f, std::fmax(-127.0f, rounded)), "%s %d", isa, i);
    }
  }
}

int main() {
  std::vector<Case> cases;
  for (int64_t rows : {1, 3, 9, 40}) {
    for (int64_t features : {1, 33, 200, 1031})
      cases.emplace_back(ConvShape{.batch = rows, .channels = features, .out_channels = rows % 2 ? 107 : 24});
  }
  ConvShape strided{.batch = 2, .height = 9, .width = 8, .channels = 3, .out_channels = 40};
  strided.kernel[0] = strided.kernel[1] = 3, strided.padding[0] = strided.padding[1] = 1;
  strided.stride[0] = 2;
  cases.emplace_back(strided);
  ConvShape dilated{.batch = 1, .height = 7, .width = 7, .channels = 64, .groups = 2, .out_channels = 70};
  dilated.kernel[0] = dilated.kernel[1] = 3, dilated.padding[0] = dilated.padding[1] = 1;
  dilated.dilation[0] = 2;
  cases.emplace_back(dilated);
  on_every_instruction_set([&](const char* isa) {
    for (Case& c : cases) {
      for (SignedInput input : {SignedInput::kReal, SignedInput::kInt8, SignedInput::kUint8}) {
        c.check(isa, input, true);
        c.check(isa, input, false);
      }
    }
    check_quantizing(isa);
  });
}
