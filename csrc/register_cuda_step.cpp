// SPDX-License-Identifier: Apache-2.0
// torch.ops.bop2nd.bop_step_ on CUDA: see register_cuda.h.
#include "register_cuda.h"

#include <algorithm>

namespace bop2nd::cuda {
namespace {

const void* one_number(const Tensor& first, const MaybeTensor& t, int64_t n, ScalarType dtype,
                       const char* what) {
  if (!t) return nullptr;
  BOP2ND_REQUIRE(t->numel() == n && t->scalar_type() == dtype && t->is_contiguous(), what, " must be ", n,
                 dtype == ScalarType::Float ? " float32 values" : " int64 values");
  check_beside(first, *t, what);
  return t->const_data_ptr();
}

StepTensor step_tensor(const Tensor& weight, const Tensor& grad, const Tensor& m, const Tensor* v) {
  StepTensor t{};
  bool packed = weight.scalar_type() == ScalarType::Int;
  t.weight_type = packed ? Dtype::kPacked : real_type<Dtype>(weight.scalar_type(), "a dense weight");
  t.grad_type = real_type<Dtype>(grad.scalar_type(), "a gradient");
  BOP2ND_REQUIRE(weight.is_contiguous() && grad.is_contiguous() && m.is_contiguous(),
                 "weights, gradients and moments must be contiguous in walk order");
  BOP2ND_REQUIRE(grad.numel() == m.numel(), "gradient and exp_avg differ in size");
  if (v) {
    BOP2ND_REQUIRE(v->is_contiguous() && v->numel() == m.numel() && v->scalar_type() == m.scalar_type(),
                   "exp_avg_sq must be like exp_avg");
    t.exp_avg_sq = v->mutable_data_ptr();
  }
  t.length = grad.numel();
  t.n_words = words_for(t.length);
  if (packed && t.length > 0) {
    BOP2ND_REQUIRE(grad.dim() > 0, "the gradient of a packed weight needs at least one axis");
    t.length = grad.size(grad.dim() - 1);
    t.n_words = grad.numel() / t.length * words_for(t.length);
    BOP2ND_REQUIRE(weight.numel() == t.n_words, "words do not fit the gradient");
  } else if (!packed) {
    BOP2ND_REQUIRE(weight.numel() == t.length, "weight and gradient differ in size");
  }
  BOP2ND_REQUIRE(t.n_words <= kMax32, "a tensor of more than 2^31 - 1 words");
  t.weight = weight.mutable_data_ptr();
  t.grad = grad.const_data_ptr();
  t.exp_avg = m.mutable_data_ptr();
  return t;
}

void bop_step_(const Tensors weights, const Tensors grads, const Tensors exp_avgs, const Tensors exp_avg_sqs,
               const Tensor hyper, const Tensor counts, const MaybeTensor inv_scale,
               const MaybeTensor found_inf, const MaybeTensor seed, bool maximize) {
  size_t n = step_size(weights, grads, exp_avgs, exp_avg_sqs);
  if (n == 0) return;
  Place place(hyper);
  StepBatch batch;
  batch.hyper = static_cast<const float*>(one_number(hyper, hyper, 4, ScalarType::Float, "hyper"));
  batch.inv_scale =
      static_cast<const float*>(one_number(hyper, inv_scale, 1, ScalarType::Float, "inv_scale"));
  batch.found_inf =
      static_cast<const float*>(one_number(hyper, found_inf, 1, ScalarType::Float, "found_inf"));
  batch.seed = static_cast<const int64_t*>(one_number(hyper, seed, 2, ScalarType::Long, "seed"));
  one_number(hyper, counts, static_cast<int64_t>(2 * n), ScalarType::Long, "counts");
  batch.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  batch.maximize = maximize;
  batch.second_moment = !exp_avg_sqs.empty();

  std::array<std::vector<StepTensor>, 2> by_state;  // fp32 and bf16 moments are different kernels
  for (size_t i = 0; i < n; ++i) {
    const Tensor* v = batch.second_moment ? &exp_avg_sqs[i] : nullptr;
    for (const Tensor* t : {&weights[i], &grads[i], &exp_avgs[i]}) check_beside(hyper, *t, "a step's tensor");
    if (v) check_beside(hyper, *v, "exp_avg_sq");
    StepTensor tensor = step_tensor(weights[i], grads[i], exp_avgs[i], v);
    Dtype state = real_type<Dtype>(exp_avgs[i].scalar_type(), "exp_avg");
    BOP2ND_REQUIRE(state != Dtype::kFloat16, "moments must be float32 or bfloat16");
    BOP2ND_REQUIRE(state == Dtype::kFloat32 || batch.seed, "bfloat16 moments need a seed");
    tensor.index = static_cast<int32_t>(i);
    tensor.flat = step_is_flat(tensor, state);
    if (tensor.n_words > 0) by_state[state == Dtype::kBFloat16 ? 1 : 0].push_back(tensor);
  }
  check(clear_memory(batch.counts, static_cast<int64_t>(2 * n * sizeof(int64_t)), place.stream), "bop_step_");
  for (int state = 0; state < 2; ++state) {
    const std::vector<StepTensor>& tensors = by_state[static_cast<size_t>(state)];
    batch.state_type = state ? Dtype::kBFloat16 : Dtype::kFloat32;
    for (size_t first = 0; first < tensors.size(); first += StepBatch::kMaxTensors) {
      int64_t n_blocks = 0;
      batch.n_tensors = 0;
      for (size_t i = first; i < std::min(tensors.size(), first + StepBatch::kMaxTensors); ++i) {
        StepTensor& slot = batch.tensors[batch.n_tensors++] = tensors[i];
        slot.first_block = static_cast<int32_t>(n_blocks);
        n_blocks += (slot.n_words + StepBatch::kBlockWords - 1) / StepBatch::kBlockWords;
      }
      check(launch_step(batch, static_cast<int>(n_blocks), place.stream), "bop_step_");
    }
  }
}

}  // namespace
}  // namespace bop2nd::cuda

STABLE_TORCH_LIBRARY_IMPL(BOP2ND_NAMESPACE, BOP2ND_DEVICE, m) {
  using namespace bop2nd::cuda;
  m.impl("bop_step_", TORCH_BOX(&bop_step_));
}
