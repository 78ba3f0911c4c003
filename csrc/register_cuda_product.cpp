// SPDX-License-Identifier: Apache-2.0
// Binary linear layers and convolutions on CUDA: see register_cuda.h.
#include "register_cuda.h"

#include <algorithm>

namespace bop2nd::cuda {
namespace {

void check_size(int64_t n, const char* what) { STD_TORCH_CHECK(n <= kMax32, "more than 2^31 - 1 ", what); }

ConvShape linear_shape(int64_t rows, int64_t features, const Tensor& weight) {
  check_words(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == words_for(features), "weight words do not fit ",
                  features, " input features");
  check_size(std::max(rows * std::max<int64_t>(1, words_for(features)), features),
             "words of input or features");
  check_size(weight.numel(), "words of weight");
  return ConvShape::linear(static_cast<int>(rows), static_cast<int>(features),
                           static_cast<int>(weight.size(0)));
}

ConvShape conv_shape(const Ints& nhw, int64_t channels, const Tensor& weight, const Ints& stride,
                     const Ints& padding, const Ints& dilation, int64_t groups, int64_t padding_value) {
  check_words(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 4 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "weight must be [O, kH, kW, words] and stride, padding, dilation two numbers");
  STD_TORCH_CHECK(groups > 0 && channels % groups == 0 && weight.size(0) % groups == 0,
                  "groups must divide input and output channels");
  STD_TORCH_CHECK(padding_value >= -1 && padding_value <= 1, "padding_value must be 0, 1 or -1");
  STD_TORCH_CHECK(weight.size(3) == words_for(channels / groups),
                  "weight words do not fit the input channels");
  int64_t padded_words = nhw[0] * std::max<int64_t>(1, groups * weight.size(3));
  std::array<Axis, 2> axes;
  for (size_t i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(stride[i] > 0 && dilation[i] > 0 && padding[i] >= 0,
                    "stride, dilation or padding out of range");
    int64_t size = nhw[i + 1] + 2 * padding[i],
            reach = dilation[i] * (weight.size(static_cast<int64_t>(i) + 1) - 1) + 1;
    STD_TORCH_CHECK(reach >= 1 && size >= reach, "the kernel does not fit the padded image");
    check_size(2 * size, "pixels along one axis, twice");  // kOutside + an offset stays outside
    check_size(stride[i], "stride");
    padded_words *= size;
    axes[i] = Axis(static_cast<int>(nhw[i + 1]), static_cast<int>(weight.size(static_cast<int64_t>(i) + 1)),
                   static_cast<int>(stride[i]), static_cast<int>(padding[i]), static_cast<int>(dilation[i]));
    check_size(padded_words, "words of padded input");
  }
  check_size(weight.numel() * kWordBits, "weights");
  return ConvShape(static_cast<int>(nhw[0]), axes[0], axes[1], static_cast<int>(groups),
                   static_cast<int>(channels / groups), static_cast<int>(weight.size(0) / groups));
}

void compute(const ConvShape& shape, int64_t padding_value, const Tensor& x, const Tensor& weight,
             Epilogue epilogue) {
  if (shape.n_rows() == 0 || shape.n_outputs() == 0) return;
  // A block counts its rows and columns from its first one on, past the last.
  check_size(int64_t{shape.n_rows()} + TallTile::kRows, "rows");
  check_size(int64_t{shape.n_outputs()} + LargeTile::kCols, "outputs");
  check_beside(x, weight, "weight");
  Place place(x);
  Tensor w = compact(weight);
  Chip chip;
  check(chip_of(place.device, &chip), "binary product");
  MatmulPlan plan = plan_matmul(shape, static_cast<int>(padding_value), chip);
  plan.fit_alignment(const_words_of(x), const_words_of(w));
  check_size(plan.n_blocks(), "blocks");
  Tensor scratch = new_tensor(x, {plan.scratch_words()}, ScalarType::Int);
  int32_t* memory = plan.scratch_words() ? static_cast<int32_t*>(scratch.mutable_data_ptr()) : nullptr;
  if (int64_t n = plan.partial_words + plan.arrival_words) {
    check(clear_memory(memory + plan.zero_begin(), n * 4, place.stream), "binary product");
  }
  MatmulProblem problem = problem_of(plan, shape, const_words_of(x), const_words_of(w), memory, epilogue);
  if (epilogue.bits && problem.epilogue.scatter_bits) {
    int64_t n_bytes = static_cast<int64_t>(shape.n_rows()) * epilogue.bit_row_words * 4;
    check(clear_memory(epilogue.bits, n_bytes, place.stream), "binary product");
  }
  TermsProblem terms = terms_of(plan, shape, static_cast<int>(padding_value), problem.x, problem.w, memory);
  check(launch_matmul(plan, problem, terms, place.stream), "binary product");
}

Epilogue values_into(const Tensor& out) {
  Epilogue e;
  e.values = out.mutable_data_ptr();
  e.value_type = real_type<Value>(out.scalar_type(), "output");
  return e;
}

std::tuple<Tensor, Tensor, Tensor> binary_linear(const Tensor input, const Tensor weight, bool ste_clip,
                                                 const MaybeTensor) {
  STD_TORCH_CHECK(input.dim() > 0, "input needs at least one axis");
  Ints sizes = sizes_of(input);
  ConvShape shape = linear_shape(product(sizes, 0, sizes.size() - 1), sizes.back(), weight);
  check_beside(input, weight, "weight");
  auto [signs, mask] = pack_tensor(input, -1, 1, ste_clip);
  sizes.back() = weight.size(0);
  Tensor out = new_tensor(input, sizes, input.scalar_type());
  compute(shape, 1, signs, weight, values_into(out));
  return {out, signs, mask};
}

std::tuple<Tensor, Tensor, Tensor> binary_conv2d(const Tensor input, const Tensor weight, const Ints stride,
                                                 const Ints padding, const Ints dilation, int64_t groups,
                                                 int64_t padding_value, bool ste_clip, const MaybeTensor) {
  STD_TORCH_CHECK(input.dim() == 4, "input must be [N, C, H, W]");
  ConvShape s = conv_shape({input.size(0), input.size(2), input.size(3)}, input.size(1), weight, stride,
                           padding, dilation, groups, padding_value);
  check_beside(input, weight, "weight");
  auto [signs, mask] = pack_tensor(input, 1, groups, ste_clip);
  Tensor out =
      new_tensor(input, {s.n_images, s.vertical.out, s.horizontal.out, s.n_outputs()}, input.scalar_type());
  compute(s, padding_value, signs, weight, values_into(out));
  return {move_axis(out, -1, 1), signs, mask};
}

// An operand of the epilogue, on the device of the others, or null.
const void* operand_beside(const Tensor& x, const MaybeTensor& given, MaybeTensor& keep, const Ints& sizes,
                           ScalarType dtype, const char* what) {
  if (given) check_beside(x, *given, what);
  return operand(given, keep, sizes, dtype, what);
}

// Values and sign words as asked for, the other one empty. `sizes` are those of the values.
std::tuple<Tensor, Tensor> packed_result(const ConvShape& s, int64_t padding_value, Ints sizes,
                                         const Tensor& x, const Tensor& weight, bool with_values,
                                         bool with_signs, const MaybeTensor& threshold,
                                         const MaybeTensor& scale, const MaybeTensor& shift,
                                         const MaybeTensor& residual, ScalarType dtype) {
  STD_TORCH_CHECK((with_values || with_signs) && (with_signs || !threshold),
                  "values or signs: one is needed, and thresholds belong to signs");
  Tensor values = new_tensor(x, with_values ? sizes : Ints{0}, dtype);
  Epilogue e;
  std::array<MaybeTensor, 4> keep;
  Ints outputs{s.n_outputs()};
  e.threshold = static_cast<const int32_t*>(
      operand_beside(x, threshold, keep[0], outputs, ScalarType::Int, "threshold"));
  e.scale = static_cast<const float*>(operand_beside(x, scale, keep[1], outputs, ScalarType::Float, "scale"));
  e.shift = static_cast<const float*>(operand_beside(x, shift, keep[2], outputs, ScalarType::Float, "shift"));
  e.residual = operand_beside(x, residual, keep[3], sizes, dtype, "residual");
  sizes.back() = words_for(s.n_outputs());
  Tensor signs = new_tensor(x, with_signs ? sizes : Ints{0}, ScalarType::Int);
  e.value_type = real_type<Value>(dtype, "dtype");
  e.values = with_values ? values.mutable_data_ptr() : nullptr;
  e.bits = with_signs ? static_cast<uint32_t*>(signs.mutable_data_ptr()) : nullptr;
  e.bit_row_words = static_cast<int>(sizes.back());
  compute(s, padding_value, x, weight, e);
  return {values, signs};
}

std::tuple<Tensor, Tensor> binary_linear_packed(const Tensor input, const Tensor weight, int64_t in_features,
                                                bool values, bool signs, const MaybeTensor threshold,
                                                const MaybeTensor scale, const MaybeTensor shift,
                                                const MaybeTensor residual, ScalarType dtype,
                                                const MaybeTensor) {
  check_words(input, "input");
  STD_TORCH_CHECK(input.dim() > 0 && input.size(input.dim() - 1) == words_for(in_features),
                  "input words do not fit ", in_features, " features");
  Ints sizes = sizes_of(input);
  ConvShape shape = linear_shape(product(sizes, 0, sizes.size() - 1), in_features, weight);
  sizes.back() = weight.size(0);
  return packed_result(shape, 1, sizes, compact(input), weight, values, signs, threshold, scale, shift,
                       residual, dtype);
}

std::tuple<Tensor, Tensor> binary_conv2d_packed(const Tensor input, const Tensor weight, int64_t in_channels,
                                                const Ints stride, const Ints padding, const Ints dilation,
                                                int64_t groups, int64_t padding_value, bool values,
                                                bool signs, const MaybeTensor threshold,
                                                const MaybeTensor scale, const MaybeTensor shift,
                                                const MaybeTensor residual, ScalarType dtype,
                                                const MaybeTensor) {
  check_words(input, "input");
  STD_TORCH_CHECK(input.dim() == 4, "input must be [N, H, W, words]");
  ConvShape s = conv_shape({input.size(0), input.size(1), input.size(2)}, in_channels, weight, stride,
                           padding, dilation, groups, padding_value);
  STD_TORCH_CHECK(input.size(3) == s.pixel_words(), "input words do not fit ", in_channels, " channels");
  Ints sizes{s.n_images, s.vertical.out, s.horizontal.out, s.n_outputs()};
  return packed_result(s, padding_value, sizes, compact(input), weight, values, signs, threshold, scale,
                       shift, residual, dtype);
}

}  // namespace
}  // namespace bop2nd::cuda

STABLE_TORCH_LIBRARY_IMPL(BOP2ND_NAMESPACE, BOP2ND_DEVICE, m) {
  using namespace bop2nd::cuda;
  m.impl("binary_linear", TORCH_BOX(&binary_linear));
  m.impl("binary_conv2d", TORCH_BOX(&binary_conv2d));
  m.impl("binary_linear_packed", TORCH_BOX(&binary_linear_packed));
  m.impl("binary_conv2d_packed", TORCH_BOX(&binary_conv2d_packed));
}
