// SPDX-License-Identifier: Apache-2.0
// torch.ops.bop2nd.bop_step_ for CPU and CUDA: operands checked and described, then handed to a device.
#pragma once

#include "core/step_operand.h"
#include "register_tensor.h"

namespace bop2nd::binding {

using bop2nd::StepOperand;

struct StepRequest {
  std::vector<StepOperand> operands;
  const float* hyper;      // gamma, sigma, a, b
  const float* inv_scale;  // or null
  const float* found_inf;  // or null
  const int64_t* seed;     // (seed, step) or null: moments are not bf16
  int64_t* counts;         // of each operand: candidates and flips
  bool maximize;
  bool second_moment;  // Bop2ndOrder
};

// On the device of `hyper`.
using Step = void (*)(const Tensor& hyper, const StepRequest&);

// `n` float32 or int64 numbers in a row beside `first`, or null.
inline const void* numbers(const Tensor& first, const MaybeTensor& given, int64_t n, ScalarType dtype,
                           const char* what) {
  if (!given) return nullptr;
  BOP2ND_REQUIRE(given->numel() == n && given->scalar_type() == dtype && given->is_contiguous(), what,
                 " must be ", n, dtype == ScalarType::Float ? " float32" : " int64", " numbers in a row");
  check_beside(first, *given, what);
  return given->const_data_ptr();
}

inline StepOperand step_operand(const Tensor& weight, const Tensor& grad, const Tensor& m, const Tensor* v) {
  StepOperand t{};
  bool packed = weight.scalar_type() == ScalarType::Int;
  t.weight_type = packed ? Dtype::kPacked : real_type<Dtype>(weight.scalar_type(), "a dense weight");
  t.grad_type = real_type<Dtype>(grad.scalar_type(), "a gradient");
  t.state_type = real_type<Dtype>(m.scalar_type(), "exp_avg");
  BOP2ND_REQUIRE(t.state_type != Dtype::kFloat16, "moments must be float32 or bfloat16");
  BOP2ND_REQUIRE(weight.is_contiguous() && grad.is_contiguous() && m.is_contiguous(),
                 "weights, gradients and moments must be contiguous in walk order");
  Ints sizes = sizes_of(grad);
  check_sizes(m, sizes, "exp_avg");
  if (v) {
    BOP2ND_REQUIRE(v->is_contiguous() && v->scalar_type() == m.scalar_type(),
                   "exp_avg_sq must be like exp_avg");
    check_sizes(*v, sizes, "exp_avg_sq");
    t.exp_avg_sq = v->mutable_data_ptr();
  }
  t.rows = 1, t.length = grad.numel();
  if (packed && t.length > 0) {
    BOP2ND_REQUIRE(grad.dim() > 0, "the gradient of a packed weight needs at least one axis");
    t.length = grad.size(grad.dim() - 1);
    t.rows = grad.numel() / t.length;
    sizes.back() = words_for(t.length);
    check_sizes(weight, sizes, "the words of a weight");
  } else if (!packed) {
    check_sizes(weight, sizes, "a dense weight");
  }
  t.weight = weight.mutable_data_ptr();
  t.grad = grad.const_data_ptr();
  t.exp_avg = m.mutable_data_ptr();
  return t;
}

template <Step step>
void bop_step_(const Tensors weights, const Tensors grads, const Tensors exp_avgs, const Tensors exp_avg_sqs,
               const Tensor hyper, const Tensor counts, const MaybeTensor inv_scale,
               const MaybeTensor found_inf, const MaybeTensor seed, bool maximize) {
  size_t n = weights.size();
  BOP2ND_REQUIRE(
      grads.size() == n && exp_avgs.size() == n && (exp_avg_sqs.empty() || exp_avg_sqs.size() == n),
      "weights, grads and moments must be lists of one length");
  auto floats = [&](const MaybeTensor& given, int64_t size, const char* what) {
    return static_cast<const float*>(numbers(hyper, given, size, ScalarType::Float, what));
  };
  StepRequest request{};
  request.hyper = floats(hyper, 4, "hyper");
  request.inv_scale = floats(inv_scale, 1, "inv_scale");
  request.found_inf = floats(found_inf, 1, "found_inf");
  request.seed = static_cast<const int64_t*>(numbers(hyper, seed, 2, ScalarType::Long, "seed"));
  numbers(hyper, counts, static_cast<int64_t>(2 * n), ScalarType::Long, "counts");
  request.maximize = maximize;
  request.second_moment = !exp_avg_sqs.empty();
  request.operands.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const Tensor* v = request.second_moment ? &exp_avg_sqs[i] : nullptr;
    for (const Tensor* t : {&weights[i], &grads[i], &exp_avgs[i], v}) {
      if (t) check_beside(hyper, *t, "a step's tensor");
    }
    request.operands.push_back(step_operand(weights[i], grads[i], exp_avgs[i], v));
    BOP2ND_REQUIRE(request.operands[i].state_type == Dtype::kFloat32 || request.seed,
                   "bfloat16 moments need a seed");
  }
  request.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  step(hyper, request);
}

}  // namespace bop2nd::binding
