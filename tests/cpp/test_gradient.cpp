// SPDX-License-Identifier: Apache-2.0
// Gradients against their definition; the same bits on every instruction set and number of threads.
#include <map>

#include "check.h"
#include "core/bit_layout.h"
#include "core/half_float.h"
#include "cpu/operators.h"

using namespace bop2nd;

int bit_of(const uint32_t* words, int64_t c) { return (words[c / kWordBits] >> (c % kWordBits)) & 1; }

// Calls see(input pixel or -1 for padding, output pixel, tap) for all of them.
template <class See>
void look(const ConvShape& s, const See& see) {
  for (int64_t n = 0, out = 0; n < s.batch; ++n) {
    for (int64_t i = 0, end = s.out_size(0) * s.out_size(1); i < end; ++i, ++out) {
      for (int64_t tap = 0; tap < s.taps(); ++tap) {
        int64_t y = i / s.out_size(1) * s.stride[0] - s.padding[0] + tap / s.kernel[1] * s.dilation[0];
        int64_t x = i % s.out_size(1) * s.stride[1] - s.padding[1] + tap % s.kernel[1] * s.dilation[1];
        bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
        see(inside ? (n * s.height + y) * s.width + x : -1, out, tap);
      }
    }
  }
}

struct Operands {
  std::vector<float> grad;
  std::vector<uint32_t> x, w, mask;

  explicit Operands(const ConvShape& s, bool whole) {
    Random random;
    grad.resize(static_cast<size_t>(s.batch * s.out_size(0) * s.out_size(1) * s.out_channels));
    for (float& g : grad)
      g = whole ? static_cast<float>(random.below(9) - 4) : static_cast<float>(random.below(1 << 20)) / 77.0f;
    x.resize(static_cast<size_t>(s.batch * s.height * s.width * s.groups * s.group_words()));
    mask.resize(x.size());
    w.resize(static_cast<size_t>(s.out_channels * s.taps() * s.group_words()));
    for (std::vector<uint32_t>* words : {&x, &w, &mask}) {
      for (uint32_t& word : *words) word = random.word();
    }
  }
};

// Whole numbers have one sum, whatever the order.
void check_sums(const char* isa, const ConvShape& s) {
  Operands on(s, true);
  int64_t pixel_words = s.groups * s.group_words(), row = s.taps() * s.group_channels();
  std::vector<float> grad_x(static_cast<size_t>(s.batch * s.height * s.width * s.channels), 0.0f);
  std::vector<float> grad_w(static_cast<size_t>(s.out_channels * row), 0.0f);
  look(s, [&](int64_t in, int64_t out, int64_t tap) {
    for (int64_t o = 0; o < s.out_channels; ++o) {
      float g = on.grad[static_cast<size_t>(out * s.out_channels + o)];
      int64_t group = o / s.group_outputs();
      const uint32_t* weight = on.w.data() + (o * s.taps() + tap) * s.group_words();
      for (int64_t c = 0; c < s.group_channels(); ++c) {
        int64_t channel = group * s.group_channels() + c;
        float sign = static_cast<float>(s.padding_value);
        if (in >= 0)
          sign = bit_of(on.x.data() + in * pixel_words + group * s.group_words(), c) ? -1.0f : 1.0f;
        grad_w[static_cast<size_t>(o * row + tap * s.group_channels() + c)] += sign * g;
        if (in >= 0) grad_x[static_cast<size_t>(in * s.channels + channel)] += bit_of(weight, c) ? -g : g;
      }
    }
  });
  Guarded<float> got_w(grad_w.size()), got_x(grad_x.size()), masked(grad_x.size());
  conv_weight_gradient(s, Dtype::kFloat32, on.grad.data(), on.x.data(), got_w.data());
  conv_input_gradient(s, Dtype::kFloat32, on.grad.data(), on.w.data(), nullptr, got_x.data());
  conv_input_gradient(s, Dtype::kFloat32, on.grad.data(), on.w.data(), on.mask.data(), masked.data());
  got_w.check_guards(isa), got_x.check_guards(isa), masked.check_guards(isa);
  for (size_t i = 0; i < grad_w.size(); ++i)
    CHECK(got_w[static_cast<int64_t>(i)] == grad_w[i], "%s gradient %zu of the weights", isa, i);
  for (int64_t i = 0; i < static_cast<int64_t>(grad_x.size()); ++i) {
    int64_t pixel = i / s.channels, group = i % s.channels / s.group_channels(), c = i % s.group_channels();
    int kept = bit_of(on.mask.data() + pixel * pixel_words + group * s.group_words(), c);
    float want = grad_x[static_cast<size_t>(i)];
    CHECK(got_x[i] == want, "%s gradient %ld of the input", isa, (long)i);
    CHECK(masked[i] == (kept ? want : 0.0f), "%s masked gradient %ld of the input", isa, (long)i);
  }
}

template <class T>
std::vector<T> input_gradient(const ConvShape& s, Dtype dtype, const Operands& on) {
  std::vector<T> grad, to(static_cast<size_t>(s.batch * s.height * s.width * s.channels));
  for (float g : on.grad) grad.push_back(from_float<T>(g));
  conv_input_gradient(s, dtype, grad.data(), on.w.data(), nullptr, to.data());
  return to;
}

// Sums of fractions depend on their order, which is one for all.
void check_bits(const char* isa, const std::string& name, const ConvShape& s) {
  static std::map<std::string, std::pair<std::vector<float>, std::vector<uint16_t>>> first;
  Operands on(s, false);
  std::vector<float> all(static_cast<size_t>(s.out_channels * s.taps() * s.group_channels()));
  conv_weight_gradient(s, Dtype::kFloat32, on.grad.data(), on.x.data(), all.data());
  std::vector<float> grad_x = input_gradient<float>(s, Dtype::kFloat32, on);
  all.insert(all.end(), grad_x.begin(), grad_x.end());
  std::vector<uint16_t> halves;
  for (BFloat16 x : input_gradient<BFloat16>(s, Dtype::kBFloat16, on)) halves.push_back(x.bits);
  for (Float16 x : input_gradient<Float16>(s, Dtype::kFloat16, on)) halves.push_back(x.bits);
  auto [entry, is_new] = first.emplace(name, std::pair{all, halves});
  if (is_new) return;
  const auto& [want, want_halves] = entry->second;
  CHECK(std::memcmp(all.data(), want.data(), all.size() * sizeof(float)) == 0, "%s %s", isa, name.c_str());
  CHECK(halves == want_halves, "%s %s in 16 bits", isa, name.c_str());
}

int main() {
  on_every_instruction_set([](const char* isa) {
    for (int padding_value : {0, 1, -1}) {
      for (const ConvShape& s : std::initializer_list<ConvShape>{
               {2, 5, 6, 40, 1, 17, {3, 3}, {1, 1}, {1, 1}, {1, 1}, padding_value},
               {1, 9, 7, 66, 2, 70, {3, 2}, {2, 1}, {1, 2}, {1, 2}, padding_value},
               {3, 7, 8, 33, 1, 5, {5, 3}, {3, 2}, {4, 0}, {1, 1}, padding_value},
               {1, 2, 2, 32, 1, 33, {3, 2}, {1, 1}, {3, 4}, {1, 3}, padding_value},
               {2, 6, 5, 6, 3, 12, {3, 3}, {1, 1}, {1, 1}, {2, 2}, padding_value},
               {3, 4, 5, 70, 1, 34, {1, 1}, {2, 2}, {0, 0}, {1, 1}, padding_value},
               {300, 1, 1, 100, 1, 40, {1, 1}, {1, 1}, {0, 0}, {1, 1}, padding_value},
               {1, 20, 20, 1, 1, 1, {7, 7}, {1, 1}, {3, 3}, {1, 1}, padding_value},
               {2, 7, 6, 21, 21, 21, {3, 3}, {1, 1}, {1, 1}, {1, 1}, padding_value},
               {1, 9, 8, 40, 40, 40, {3, 2}, {2, 3}, {2, 1}, {1, 2}, padding_value},
               {0, 4, 4, 32, 1, 16, {3, 3}, {1, 1}, {1, 1}, {1, 1}, padding_value},
               {2, 4, 4, 32, 1, 0, {3, 3}, {1, 1}, {1, 1}, {1, 1}, padding_value}}) {
        check_sums(isa, s);
      }
    }
    check_bits(isa, "a layer", {4, 14, 14, 96, 1, 160, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0});
    check_bits(isa, "strides", {2, 15, 15, 64, 2, 64, {3, 3}, {2, 2}, {1, 1}, {1, 1}, 0});
    check_bits(isa, "depthwise", {2, 15, 15, 70, 70, 70, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0});
    check_bits(isa, "linear", {270, 1, 1, 300, 1, 90, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 0});
  });
}
