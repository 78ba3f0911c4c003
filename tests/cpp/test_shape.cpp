// SPDX-License-Identifier: Apache-2.0
// The limits of a convolution's geometry: each is kept on one side, refused on the other.
#include "check.h"
#include "core/conv_shape.h"

using bop2nd::checked;
using bop2nd::ConvShape;

constexpr int64_t kTwo31 = int64_t{1} << 31;

bool kept(const ConvShape& s) {
  try {
    checked(s);
  } catch (const std::invalid_argument& refusal) {
    CHECK(std::string(refusal.what()).find("kernel (") != std::string::npos, "%s", refusal.what());
    return false;
  }
  return true;
}

const ConvShape kPlain{.batch = 2,
                       .height = 8,
                       .width = 9,
                       .channels = 64,
                       .groups = 2,
                       .out_channels = 32,
                       .kernel = {3, 3},
                       .stride = {1, 2},
                       .padding = {1, 0}};

// Applies a change to the plain shape.
template <class Change>
bool kept_with(const Change& change) {
  ConvShape s = kPlain;
  change(s);
  return kept(s);
}

int main() {
  CHECK(kept(kPlain), "the plain shape");
  CHECK(kPlain.out_size(0) == 8 && kPlain.out_size(1) == 4, "sizes of the output");
  for (int64_t wrong : {int64_t{0}, int64_t{-1}, kTwo31, int64_t{1} << 62, INT64_MAX, INT64_MIN}) {
    for (int axis = 0; axis < 2; ++axis) {
      CHECK(!kept_with([&](ConvShape& s) { s.kernel[axis] = wrong; }), "kernel %ld", wrong);
      CHECK(!kept_with([&](ConvShape& s) { s.stride[axis] = wrong; }), "stride %ld", wrong);
      CHECK(!kept_with([&](ConvShape& s) { s.dilation[axis] = wrong; }), "dilation %ld", wrong);
      if (wrong != 0) CHECK(!kept_with([&](ConvShape& s) { s.padding[axis] = wrong; }), "padding %ld", wrong);
    }
    CHECK(!kept_with([&](ConvShape& s) { s.groups = wrong; }), "groups %ld", wrong);
    if (wrong == 0) continue;
    CHECK(!kept_with([&](ConvShape& s) { s.batch = wrong; }), "batch %ld", wrong);
    CHECK(!kept_with([&](ConvShape& s) { s.height = wrong; }), "height %ld", wrong);
    CHECK(!kept_with([&](ConvShape& s) { s.width = wrong; }), "width %ld", wrong);
    CHECK(!kept_with([&](ConvShape& s) { s.channels = wrong; }), "channels %ld", wrong);
    CHECK(!kept_with([&](ConvShape& s) { s.out_channels = wrong; }), "outputs %ld", wrong);
  }
  CHECK(!kept_with([](ConvShape& s) { s.padding_value = 2; }), "padding value");
  CHECK(!kept_with([](ConvShape& s) { s.dilation[0] = 5; }), "the kernel does not fit");
  CHECK(!kept_with([](ConvShape& s) { s.channels = s.out_channels = 0, s.groups = 2; }), "groups of nothing");
  CHECK(kept_with([](ConvShape& s) { s.channels = 0; }), "no channels");
  CHECK(kept_with([](ConvShape& s) { s.out_channels = 0; }), "no outputs");
  // Words of the padded input, where a pixel of no words counts as one.
  for (int64_t channels : {0, 64}) {
    auto wide = [&](int64_t width) {
      ConvShape s{.batch = 1, .height = 1 << 10, .width = width, .channels = channels, .out_channels = 1};
      s.padding_value = 1;
      return kept(s);
    };
    int64_t limit = (kTwo31 >> 10) / (channels > 0 ? 2 : 1);
    CHECK(wide(limit - 1) && !wide(limit), "%ld channels", channels);
  }
  CHECK(!kept({1, 8, 64, 1024, 1, 16, {3, 3}, {1, 1}, {1 << 20, 1}, {1 << 20, 1}, 0}), "border");
  CHECK(!kept({1 << 20, 1 << 6, 1 << 6, 32, 1, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 0}), "batch");
  // Words of the weight, products of an output, products of all.
  auto linear = [](int64_t rows, int64_t features, int64_t outputs) {
    return kept({rows, 1, 1, features, 1, outputs, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 0});
  };
  CHECK(linear(1, 64, (kTwo31 >> 1) - 1) && !linear(1, 64, kTwo31 >> 1), "words of the weight");
  CHECK(linear(1, (1 << 24) - 1, 1) && !linear(1, 1 << 24, 1), "products of an output");
  CHECK(linear(1 << 25, 64, 1 << 28) && !linear(1 << 26, 64, 1 << 28), "products of all");
  CHECK(linear(0, 0, 0) && linear(kTwo31 - 1, 0, 1) && !linear(kTwo31 - 1, 0, 1 << 30),
        "nothing to multiply");
  // Sizes that change nothing become small.
  ConvShape s = kPlain;
  s.stride[0] = kTwo31 - 1, s.kernel[1] = 1, s.dilation[1] = kTwo31 - 1;
  s = checked(s);
  CHECK(s.stride[0] == 8 && s.out_size(0) == 1 && s.dilation[1] == 1 && s.out_size(1) == 5, "made small");
  std::printf("limits of a convolution's geometry hold\n");
  return 0;
}
