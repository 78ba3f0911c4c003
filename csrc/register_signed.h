// SPDX-License-Identifier: Apache-2.0
// The products of signs with real numbers and 8-bit integers, for CPU tensors: operands checked as in
// bop2nd_fast/ops/signed_product.py.
#pragma once

#include "cpu/signed_product.h"
#include "register_product.h"

namespace bop2nd::binding {

#define BOP2ND_SIGNED_OPERANDS                                                                               \
  int64_t multiplier, int64_t zero_point, const MaybeTensor input_scale, const MaybeTensor straight_through, \
      BOP2ND_OUTPUTS
#define BOP2ND_SIGNED_ASKED multiplier, zero_point, input_scale, straight_through, BOP2ND_ASKED

inline SignedInput signed_input(const Tensor& input) {
  switch (input.scalar_type()) {
    case ScalarType::Char:
      return SignedInput::kInt8;
    case ScalarType::Byte:
      return SignedInput::kUint8;
    case ScalarType::Float:
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return SignedInput::kReal;
    default:
      refuse("input must be float32, bfloat16, float16, int8 or uint8, got ",
             torch::headeronly::toString(input.scalar_type()));
  }
}

// The limits of integers and what belongs to them.
inline void check_scaling(const ConvShape& s, SignedInput kind, const Tensor& input, int64_t multiplier,
                          int64_t zero_point, bool thresholds) {
  if (kind == SignedInput::kReal) {
    BOP2ND_REQUIRE(multiplier == 1 && zero_point == 0, "multiplier ", multiplier, " and zero_point ",
                   zero_point, " belong to int8 and uint8 inputs");
    BOP2ND_REQUIRE(!thresholds, "thresholds belong to int8 and uint8 inputs; use shift or sign_shift");
    return;
  }
  int64_t low = kind == SignedInput::kInt8 ? -128 : 0, high = kind == SignedInput::kInt8 ? 127 : 255;
  BOP2ND_REQUIRE(multiplier >= 1 && multiplier <= 65536, "multiplier is ", multiplier,
                 ", allowed is 1 to 2**16");
  BOP2ND_REQUIRE(zero_point >= multiplier * low && zero_point <= multiplier * high, "zero_point is ",
                 zero_point, ", allowed is ", multiplier * low, " to ", multiplier * high, " for ",
                 torch::headeronly::toString(input.scalar_type()), " times ", multiplier);
  int64_t products = s.taps() * s.group_channels();
  int64_t largest = std::max(zero_point - multiplier * low, multiplier * high - zero_point);
  BOP2ND_REQUIRE(limits::fits({products, largest}, kMaxInt32), products, " products of up to ", largest,
                 " exceed int32: their sum may reach ", products * largest, ", allowed is less than 2**31");
}

// Real inputs as fp32, which the loops read.
inline Tensor widened(const Tensor& input) {
  bool narrow = signed_input(input) == SignedInput::kReal && input.scalar_type() != ScalarType::Float;
  return narrow ? torch::stable::to(input, ScalarType::Float) : input;
}

// `axes`: of the widened input, for images, rows, columns and channels.
inline std::tuple<Tensor, Tensor> signed_result(const ConvShape& s, const Ints& sizes, const Tensor& input,
                                                const std::array<Axes, 4>& axes, const Tensor& weight,
                                                int64_t rows, BOP2ND_SIGNED_OPERANDS) {
  SignedProduct p{};
  p.shape = s, p.input = signed_input(input);
  check_scaling(s, p.input, input, multiplier, zero_point, threshold.has_value());
  MaybeTensor scales;
  if (input_scale) {
    BOP2ND_REQUIRE(input_scale->scalar_type() == ScalarType::Float &&
                       (input_scale->numel() == 1 || input_scale->numel() == rows),
                   "input_scale must be float32 with 1 or ", rows, " elements, got ",
                   torch::headeronly::toString(input_scale->scalar_type()), " ",
                   text_of(sizes_of(*input_scale)));
    check_beside(input, *input_scale, "input_scale");
    scales = compact(*input_scale);
    p.input_scale = static_cast<const float*>(scales->const_data_ptr());
    p.scale_per_image = input_scale->numel() != 1;
  }
  BOP2ND_REQUIRE(!straight_through || sizes_of(*straight_through) == sizes_of(input),
                 "straight_through must have the input's shape ", text_of(sizes_of(input)), ", got ",
                 text_of(sizes_of(*straight_through)));
  p.x = input.const_data_ptr();
  p.image_stride = axes[0].stride, p.row_stride = axes[1].stride;
  p.column_stride = axes[2].stride, p.channel_stride = axes[3].stride;
  p.multiplier = static_cast<int32_t>(multiplier), p.zero_point = static_cast<int32_t>(zero_point);
  check_beside(input, weight, "weight");
  Tensor w = compact(weight);
  MaybeTensor prepacked;
  if (blocked) {
    check_words(*blocked, "blocked");
    int64_t row_words = s.taps() * s.group_words();
    BOP2ND_REQUIRE(blocked->numel() == s.groups * s.group_blocks() * row_words * 16,
                   "blocked does not belong to this weight");
    prepacked = compact(*blocked);
    p.blocked = const_words_of(*prepacked);
  }
  p.w = const_words_of(w);
  return asked_outputs(s, sizes, input, BOP2ND_ASKED, [&](const Epilogue& to) {
    p.to = to;
    signed_product(p);
  });
}

inline std::tuple<Tensor, Tensor> signed_linear(const Tensor given, const Tensor weight,
                                                BOP2ND_SIGNED_OPERANDS) {
  check_extent(given, "input");
  BOP2ND_REQUIRE(given.dim() > 0, "input needs at least one axis");
  Tensor input = widened(given);
  Ints sizes = sizes_of(given);
  int64_t rows = product(sizes, 0, sizes.size() - 1), features = sizes.back();
  ConvShape s = linear_shape(rows, features, weight);
  sizes.back() = s.out_channels;
  Axes outer = Axes::of(input, 0, input.dim() - 1);
  if (!outer.uniform || features == 0) input = compact(input), outer.stride = features;
  Axes column = outer;
  int64_t step = input.stride(input.dim() - 1);
  Axes channel{.size = features, .stride = step};
  return signed_result(s, sizes, input, {column, column, column, channel}, weight, rows, BOP2ND_SIGNED_ASKED);
}

inline std::tuple<Tensor, Tensor> signed_conv2d(const Tensor given, const Tensor weight,
                                                BOP2ND_UNPADDED_OF(const Ints), BOP2ND_SIGNED_OPERANDS) {
  check_extent(given, "input");
  BOP2ND_REQUIRE(given.dim() == 4, "input must be [N, C, H, W]");
  Tensor input = widened(given);
  constexpr int64_t padding_value = 0;
  ConvShape s = conv_shape(given.size(0), given.size(2), given.size(3), given.size(1), weight,
                           BOP2ND_GEOMETRY_ARGUMENTS);
  Ints sizes{s.batch, s.out_size(0), s.out_size(1), s.out_channels};
  auto axis = [&](int64_t i) { return Axes{.size = input.size(i), .stride = input.stride(i)}; };
  return signed_result(s, sizes, input, {axis(0), axis(2), axis(3), axis(1)}, weight, s.batch,
                       BOP2ND_SIGNED_ASKED);
}

inline std::tuple<Tensor, Tensor> quantize_rows(const Tensor input, bool per_row) {
  Dtype dtype = real_type<Dtype>(input.scalar_type(), "input");
  check_extent(input, "input");
  BOP2ND_REQUIRE(input.dim() > 0, "input needs at least one axis");
  Ints sizes = sizes_of(input);
  int64_t length = sizes.back(), rows = product(sizes, 0, sizes.size() - 1);
  Tensor x = compact(input), q = new_tensor(input, sizes, ScalarType::Char);
  sizes.pop_back();
  Tensor scale = new_tensor(input, per_row ? sizes : Ints{1}, ScalarType::Float);
  int64_t bad = bop2nd::quantize_rows(dtype, x.const_data_ptr(), rows, length, per_row,
                                      static_cast<int8_t*>(q.mutable_data_ptr()),
                                      static_cast<float*>(scale.mutable_data_ptr()));
  BOP2ND_REQUIRE(bad == 0, bad, " of ", rows, " rows have infinite or NaN elements");
  return {q, scale};
}

}  // namespace bop2nd::binding
