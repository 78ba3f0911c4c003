// SPDX-License-Identifier: Apache-2.0
// Binary linear layers and convolutions on CUDA: see register_cuda.h.
#include "register_cuda.h"
#include "register_product.h"

namespace bop2nd::cuda {
namespace {

void compute(const ConvShape& shape, const Tensor& x, const Tensor& weight, const MaybeTensor&,
             const Epilogue& epilogue) {
  if (shape.out_pixels() == 0 || shape.out_channels == 0) return;
  BOP2ND_REQUIRE(ConvView::fits(shape), "more rows, outputs or pixels than a GPU kernel takes");
  ConvView view(shape);
  check_beside(x, weight, "weight");
  Place place(x);
  Tensor w = compact(weight);
  Chip chip;
  check(chip_of(place.device, &chip), "binary product");
  MatmulPlan plan = plan_matmul(view, chip);
  plan.fit_alignment(const_words_of(x), const_words_of(w));
  BOP2ND_REQUIRE(plan.n_blocks() <= kMax32, "more than 2^31 - 1 blocks");
  Tensor scratch = new_tensor(x, {plan.scratch_words()}, ScalarType::Int);
  int32_t* memory = plan.scratch_words() ? static_cast<int32_t*>(scratch.mutable_data_ptr()) : nullptr;
  if (int64_t n = plan.partial_words + plan.arrival_words) {
    check(clear_memory(memory + plan.zero_begin(), n * 4, place.stream), "binary product");
  }
  MatmulProblem problem = problem_of(plan, view, const_words_of(x), const_words_of(w), memory, epilogue);
  if (epilogue.signs && problem.scatter_bits) {
    int64_t n_bytes = shape.out_pixels() * words_for(shape.out_channels) * 4;
    check(clear_memory(epilogue.signs, n_bytes, place.stream), "binary product");
  }
  TermsProblem terms = terms_of(plan, view, problem.x, problem.w, memory);
  check(launch_matmul(plan, problem, terms, place.stream), "binary product");
}

Epilogue values_into(const Tensor& out) {
  Epilogue e;
  e.values = out.mutable_data_ptr();
  e.dtype = real_type<Dtype>(out.scalar_type(), "output");
  return e;
}

std::tuple<Tensor, Tensor, Tensor> binary_linear(const Tensor input, const Tensor weight, bool ste_clip,
                                                 const MaybeTensor) {
  BOP2ND_REQUIRE(input.dim() > 0, "input needs at least one axis");
  Ints sizes = sizes_of(input);
  ConvShape shape = linear_shape(product(sizes, 0, sizes.size() - 1), sizes.back(), weight);
  check_beside(input, weight, "weight");
  auto [signs, mask] = pack_tensor(input, -1, 1, ste_clip);
  sizes.back() = weight.size(0);
  Tensor out = new_tensor(input, sizes, input.scalar_type());
  compute(shape, signs, weight, {}, values_into(out));
  return {out, signs, mask};
}

std::tuple<Tensor, Tensor, Tensor> binary_conv2d(const Tensor input, const Tensor weight, BOP2ND_GEOMETRY,
                                                 bool ste_clip, const MaybeTensor) {
  BOP2ND_REQUIRE(input.dim() == 4, "input must be [N, C, H, W]");
  ConvShape s = conv_shape(input.size(0), input.size(2), input.size(3), input.size(1), weight,
                           BOP2ND_GEOMETRY_ARGUMENTS);
  check_beside(input, weight, "weight");
  auto [signs, mask] = pack_tensor(input, 1, groups, ste_clip);
  Tensor out =
      new_tensor(input, {s.batch, s.out_size(0), s.out_size(1), s.out_channels}, input.scalar_type());
  compute(s, signs, weight, {}, values_into(out));
  return {move_axis(out, -1, 1), signs, mask};
}

}  // namespace
}  // namespace bop2nd::cuda

STABLE_TORCH_LIBRARY_IMPL(BOP2ND_NAMESPACE, BOP2ND_DEVICE, m) {
  using namespace bop2nd::cuda;
  m.impl("binary_linear", TORCH_BOX(&binary_linear));
  m.impl("binary_conv2d", TORCH_BOX(&binary_conv2d));
  m.impl("binary_linear_packed", TORCH_BOX(&linear_packed<compute>));
  m.impl("binary_conv2d_packed", TORCH_BOX(&conv2d_packed<compute>));
}
