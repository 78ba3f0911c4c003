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

void compute_planes(const ConvShape& shape, const Tensor& signs, const Tensor& weight,
                    const MaybeTensor& blocked, const Tensor& out) {
  Tensor image = new_channels_last(out, sizes_of(out), out.scalar_type());
  compute(shape, signs, weight, blocked, values_into(image));
  Tensor to = out;
  torch::stable::copy_(to, image);
}

}  // namespace
}  // namespace bop2nd::cuda

STABLE_TORCH_LIBRARY_IMPL(BOP2ND_NAMESPACE, BOP2ND_DEVICE, m) {
  using namespace bop2nd::cuda;
  m.impl("binary_linear", TORCH_BOX((&linear<compute, pack_tensor>)));
  m.impl("binary_conv2d", TORCH_BOX((&conv2d<compute, pack_tensor, compute_planes>)));
  m.impl("binary_linear_packed", TORCH_BOX(&linear_packed<compute>));
  m.impl("binary_conv2d_packed", TORCH_BOX(&conv2d_packed<compute>));
}
