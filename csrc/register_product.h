// SPDX-License-Identifier: Apache-2.0
// What the bindings of products share: the geometry of their operands, checked before anything is computed
// from it, and which operands belong to it.
#pragma once

#include "core/conv_shape.h"
#include "core/epilogue.h"
#include "register_pack.h"

namespace bop2nd::binding {

// [outputs, words]; `features` of each row.
inline ConvShape linear_shape(int64_t rows, int64_t features, const Tensor& weight) {
  check_words(weight, "weight");
  BOP2ND_REQUIRE(weight.dim() == 2 && features >= 0 && weight.size(1) == words_for(features), "weight words ",
                 text_of(sizes_of(weight)), " do not fit ", features, " input features");
  return checked({.batch = rows, .channels = features, .out_channels = weight.size(0)});
}

// How a kernel is laid over an image: parameters of the operators, in the order of Arguments
// (kernels/geometry.py), without and with what a padded tap counts as; and as arguments.
#define BOP2ND_UNPADDED_OF(List) List stride, List padding, List dilation, int64_t groups
#define BOP2ND_GEOMETRY_OF(List) BOP2ND_UNPADDED_OF(List), int64_t padding_value
#define BOP2ND_GEOMETRY BOP2ND_GEOMETRY_OF(const Ints)
#define BOP2ND_GEOMETRY_ARGUMENTS stride, padding, dilation, groups, padding_value

// [outputs, kernel rows, kernel columns, words of a group]; images and their size.
inline ConvShape conv_shape(int64_t batch, int64_t height, int64_t width, int64_t channels,
                            const Tensor& weight, BOP2ND_GEOMETRY_OF(const Ints&)) {
  check_words(weight, "weight");
  BOP2ND_REQUIRE(weight.dim() == 4 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                 "weight must be [O, kH, kW, words] and stride, padding, dilation two numbers");
  BOP2ND_REQUIRE(padding_value >= -1 && padding_value <= 1, "padding_value must be 0, 1 or -1");
  ConvShape s = checked({.batch = batch,
                         .height = height,
                         .width = width,
                         .channels = channels,
                         .groups = groups,
                         .out_channels = weight.size(0),
                         .kernel = {weight.size(1), weight.size(2)},
                         .stride = {stride[0], stride[1]},
                         .padding = {padding[0], padding[1]},
                         .dilation = {dilation[0], dilation[1]},
                         .padding_value = static_cast<int>(padding_value)});
  BOP2ND_REQUIRE(weight.size(3) == s.group_words(), "weight words ", text_of(sizes_of(weight)),
                 " do not fit ", channels, " input channels in ", groups, " groups");
  return s;
}

// What a backward pass is given, besides the shape: `saved` are the sizes of the words of the input.
inline void check_saved(const Tensor& grad, const Ints& grad_sizes, const Tensor& signs, const Tensor& mask,
                        const Ints& saved) {
  check_words(signs, "signs"), check_words(mask, "mask");
  check_sizes(grad, grad_sizes, "grad_output");
  check_sizes(signs, saved, "signs");
  if (sizes_of(mask) != Ints{0}) check_sizes(mask, saved, "mask (or empty)");
}

// What a packed product is asked to emit: the schema's keywords (SCHEMA in kernels/outputs.py), in their
// order, as parameters and as arguments.
#define BOP2ND_PARAMETER(name) const MaybeTensor name,
#define BOP2ND_ARGUMENT(name) name,
#define BOP2ND_OUTPUTS                                                              \
  bool values, bool signs, const MaybeTensor threshold, const MaybeTensor residual, \
      std::optional<int64_t> low, std::optional<int64_t> high, bool relu,           \
      BOP2ND_PER_OUTPUT(BOP2ND_PARAMETER) ScalarType dtype, const MaybeTensor blocked
#define BOP2ND_ASKED \
  values, signs, threshold, residual, low, high, relu, BOP2ND_PER_OUTPUT(BOP2ND_ARGUMENT) dtype, blocked

// compute(shape, words of the input, weight words, blocked, epilogue) on one device.
using Compute = void (*)(const ConvShape&, const Tensor&, const Tensor&, const MaybeTensor&, const Epilogue&);

// Values and sign words as asked for, the other one empty. `sizes` are those of the values.
// run(epilogue) fills them.
template <class Run>
std::tuple<Tensor, Tensor> asked_outputs(const ConvShape& s, Ints sizes, const Tensor& x, BOP2ND_OUTPUTS,
                                         const Run& run) {
  constexpr int64_t kWhole = int64_t{1} << 24;  // fp32 holds whole numbers up to here
  int64_t least = low.value_or(-kWhole), most = high.value_or(kWhole);
  BOP2ND_REQUIRE((values || signs) && (signs || !threshold),
                 "values or signs: one is needed, and thresholds belong to signs");
  BOP2ND_REQUIRE(least >= -kWhole && most <= kWhole && least <= most, "low ", least, " and high ", most,
                 " must be in this order and within 2**24");
  BOP2ND_REQUIRE(!(relu && slope), "relu and slope: one activation");
  BOP2ND_REQUIRE(!sign_shift || (signs && !threshold), "sign_shift belongs to signs without thresholds");
#define BOP2ND_ONE(name) +1
  std::array<MaybeTensor, 2 BOP2ND_PER_OUTPUT(BOP2ND_ONE)> kept;
#undef BOP2ND_ONE
  size_t n_kept = 0;
  auto per_output = [&](const MaybeTensor& given, const char* what) {
    if (given) check_beside(x, *given, what);
    return static_cast<const float*>(
        operand(given, kept[n_kept++], {s.out_channels}, ScalarType::Float, what));
  };
  Epilogue to;
  if (threshold) check_beside(x, *threshold, "threshold");
  if (residual) check_beside(x, *residual, "residual");
  to.threshold = static_cast<const int32_t*>(
      operand(threshold, kept[n_kept++], {s.out_channels}, ScalarType::Int, "threshold"));
  to.residual = operand(residual, kept[n_kept++], sizes, dtype, "residual");
  to.low = low ? static_cast<int32_t>(least) : INT32_MIN,
  to.high = high ? static_cast<int32_t>(most) : INT32_MAX;
  to.relu = relu;
#define BOP2ND_FILL(name) to.name = per_output(name, #name);
  BOP2ND_PER_OUTPUT(BOP2ND_FILL)
#undef BOP2ND_FILL
  Tensor reals = new_tensor(x, values ? sizes : Ints{0}, dtype);
  sizes.back() = words_for(s.out_channels);
  Tensor bits = new_tensor(x, signs ? sizes : Ints{0}, ScalarType::Int);
  to.dtype = real_type<Dtype>(dtype, "dtype");
  to.values = values ? reals.mutable_data_ptr() : nullptr;
  to.signs = signs ? words_of(bits) : nullptr;
  run(to);
  return {reals, bits};
}

template <Compute compute>
std::tuple<Tensor, Tensor> packed_result(const ConvShape& s, const Ints& sizes, const Tensor& x,
                                         const Tensor& weight, BOP2ND_OUTPUTS) {
  return asked_outputs(s, sizes, x, BOP2ND_ASKED, [&](const Epilogue& to) {
    check_beside(x, weight, "weight");
    compute(s, compact(x), weight, blocked, to);
  });
}

template <Compute compute>
std::tuple<Tensor, Tensor> linear_packed(const Tensor input, const Tensor weight, int64_t in_features,
                                         BOP2ND_OUTPUTS) {
  check_words(input, "input");
  BOP2ND_REQUIRE(input.dim() > 0 && in_features >= 0 && input.size(input.dim() - 1) == words_for(in_features),
                 "input words ", text_of(sizes_of(input)), " do not fit ", in_features, " features");
  check_extent(input, "input");
  Ints sizes = sizes_of(input);
  ConvShape s = linear_shape(product(sizes, 0, sizes.size() - 1), in_features, weight);
  sizes.back() = s.out_channels;
  return packed_result<compute>(s, sizes, input, weight, BOP2ND_ASKED);
}

template <Compute compute>
std::tuple<Tensor, Tensor> conv2d_packed(const Tensor input, const Tensor weight, int64_t in_channels,
                                         BOP2ND_GEOMETRY, BOP2ND_OUTPUTS) {
  check_words(input, "input");
  BOP2ND_REQUIRE(input.dim() == 4, "input must be [N, H, W, words]");
  ConvShape s =
      conv_shape(input.size(0), input.size(1), input.size(2), in_channels, weight, BOP2ND_GEOMETRY_ARGUMENTS);
  BOP2ND_REQUIRE(input.size(3) == groups * s.group_words(), "input words ", text_of(sizes_of(input)),
                 " do not fit ", in_channels, " channels");
  Ints sizes{s.batch, s.out_size(0), s.out_size(1), s.out_channels};
  return packed_result<compute>(s, sizes, input, weight, BOP2ND_ASKED);
}

// ---- What trains: real values in and out, and what the backward pass is given.

inline Epilogue values_into(const Tensor& out) {
  Epilogue to;
  to.dtype = real_type<Dtype>(out.scalar_type(), "output");
  to.values = out.mutable_data_ptr();
  return to;
}

template <Compute compute, PackTensor pack>
std::tuple<Tensor, Tensor, Tensor> linear(const Tensor input, const Tensor weight, bool ste_clip,
                                          const MaybeTensor blocked) {
  BOP2ND_REQUIRE(input.dim() > 0, "input needs at least one axis");
  Ints sizes = sizes_of(input);
  ConvShape s = linear_shape(product(sizes, 0, sizes.size() - 1), sizes.back(), weight);
  check_beside(input, weight, "weight");
  auto [signs, mask] = pack(input, -1, 1, ste_clip);
  sizes.back() = s.out_channels;
  Tensor out = new_tensor(input, sizes, input.scalar_type());
  compute(s, signs, weight, blocked, values_into(out));
  return {out, signs, mask};
}

// The dots of a convolution as a contiguous image.
using ComputePlanes = void (*)(const ConvShape&, const Tensor& signs, const Tensor& weight,
                               const MaybeTensor& blocked, const Tensor& out);

template <Compute compute, PackTensor pack, ComputePlanes planes>
std::tuple<Tensor, Tensor, Tensor> conv2d(const Tensor input, const Tensor weight, BOP2ND_GEOMETRY,
                                          bool ste_clip, const MaybeTensor blocked) {
  BOP2ND_REQUIRE(input.dim() == 4, "input must be [N, C, H, W]");
  ConvShape s = conv_shape(input.size(0), input.size(2), input.size(3), input.size(1), weight,
                           BOP2ND_GEOMETRY_ARGUMENTS);
  check_beside(input, weight, "weight");
  auto [signs, mask] = pack(input, 1, groups, ste_clip);
  Ints sizes{s.batch, s.out_channels, s.out_size(0), s.out_size(1)};
  bool last = is_channels_last(input);
  Tensor out = last ? new_channels_last(input, sizes, input.scalar_type())
                    : new_tensor(input, sizes, input.scalar_type());
  if (last || s.out_size(0) * s.out_size(1) == 1)  // a single pixel lies the same way
    compute(s, signs, weight, blocked, values_into(out));
  else
    planes(s, signs, weight, blocked, out);
  return {out, signs, mask};
}

}  // namespace bop2nd::binding
