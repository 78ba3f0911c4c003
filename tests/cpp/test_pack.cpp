// SPDX-License-Identifier: Apache-2.0
// Packing and unpacking against the definition of the bit layout.
#include "check.h"
#include "core/bit_layout.h"
#include "core/half_float.h"
#include "cpu/operators.h"

using namespace bop2nd;

template <class T>
void check_pack(const char* isa, Dtype dtype, PackShape s, size_t n_values) {
  s.dtype = dtype;
  Random random;
  std::vector<T> x(n_values);
  for (T& value : x) value = from_float<T>(random.real());
  int64_t words = words_for(s.length), rows = s.n_outer * s.n_inner;
  Guarded<uint32_t> signs(static_cast<size_t>(rows * s.n_groups * words)), mask(signs.size()),
      only(signs.size());
  pack(s, x.data(), signs.data(), mask.data());
  pack(s, x.data(), only.data(), nullptr);
  signs.check_guards(isa), mask.check_guards(isa), only.check_guards(isa);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < s.n_groups; ++g) {
      for (int64_t e = 0; e < words * kWordBits; ++e) {
        int64_t outer = r / s.n_inner, inner = r % s.n_inner;
        float value = 2.0f;  // beyond the end: sign +1, outside the mask
        if (e < s.length) {
          value = to_float(x[static_cast<size_t>(outer * s.outer_stride + inner * s.inner_stride +
                                                 g * s.group_stride + e * s.length_stride)]);
        }
        int64_t word = (r * s.n_groups + g) * words + BitLayout::word_of(e);
        int bit = BitLayout::bit_of(e);
        CHECK(((signs[word] >> bit) & 1) == (value < 0 ? 1u : 0u), "%s row %ld element %ld", isa, (long)r,
              (long)e);
        CHECK(((mask[word] >> bit) & 1) == (value <= 1 && value >= -1 ? 1u : 0u), "%s mask of element %ld",
              isa, (long)e);
        CHECK(only[word] == signs[word], "%s without mask", isa);
      }
    }
  }
}

template <class T>
void check_unpack(const char* isa, Dtype dtype, int64_t rows, int64_t length) {
  Random random;
  int64_t words = words_for(length);
  std::vector<uint32_t> packed(static_cast<size_t>(rows * words));
  for (uint32_t& word : packed) word = random.word();
  Guarded<T> out(static_cast<size_t>(rows * length));
  unpack(packed.data(), rows, length, dtype, out.data());
  out.check_guards(isa);
  for (int64_t i = 0; i < rows * length; ++i) {
    int64_t e = i % length;
    uint32_t word = packed[static_cast<size_t>(i / length * words + BitLayout::word_of(e))];
    float want = (word >> BitLayout::bit_of(e)) & 1 ? -1.0f : 1.0f;
    CHECK(to_float(out[i]) == want, "%s element %ld", isa, (long)i);
  }
}

template <class T>
void check_type(const char* isa, Dtype dtype) {
  for (int64_t length : {0, 1, 31, 32, 33, 63, 64, 65, 511, 512, 513, 1031}) {
    size_t n = static_cast<size_t>(5 * length);
    check_pack<T>(isa, dtype, {dtype, 5, length, 1, length, length, 1, 1, 1}, n);
    check_unpack<T>(isa, dtype, 3, length);
  }
  for (int64_t length : {1, 31, 32, 33, 70}) {
    for (int64_t inner : {2, 15, 16, 17, 49}) {
      for (int64_t groups : {1, 2}) {
        int64_t channels = groups * length;
        size_t n = static_cast<size_t>(3 * channels * inner);
        // channels outside, pixels inside; and the other way round
        check_pack<T>(isa, dtype,
                      {dtype, 3, channels * inner, groups, length * inner, length, inner, inner, 1}, n);
        check_pack<T>(isa, dtype, {dtype, 3, channels * inner, groups, length, length, 1, inner, channels},
                      n);
      }
    }
  }
}

// Every fp16 and bf16 number survives the way to fp32 and back; rounding agrees with a search.
void check_half_floats() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    Float16 half{static_cast<uint16_t>(bits)};
    BFloat16 brain{static_cast<uint16_t>(bits)};
    float a = to_float(half), b = to_float(brain);
    if (a == a) CHECK(from_float<Float16>(a).bits == bits, "fp16 %x", bits);
    if (b == b) CHECK(from_float<BFloat16>(b).bits == bits, "bf16 %x", bits);
    if (a != a || bits >= 0x7C00) continue;
    float next = to_float(Float16{static_cast<uint16_t>(bits + 1)});
    float middle = bits == 0x7BFF ? 65520.0f : 0.5f * (a + next);
    CHECK(from_float<Float16>(middle).bits == bits + (bits & 1), "the middle after %x rounds to even", bits);
    CHECK(from_float<Float16>(float_of_bits(bits_of_float(middle) - 1)).bits == bits, "below the middle %x",
          bits);
    CHECK(from_float<Float16>(float_of_bits(bits_of_float(middle) + 1)).bits == bits + 1,
          "above the middle %x", bits);
  }
  CHECK(to_float(Float16{1}) == 0x1p-24f && to_float(Float16{0x3C00}) == 1.0f, "known values");
}

int main() {
  check_half_floats();
  on_every_instruction_set([](const char* isa) {
    check_type<float>(isa, Dtype::kFloat32);
    check_type<BFloat16>(isa, Dtype::kBFloat16);
    check_type<Float16>(isa, Dtype::kFloat16);
  });
}
