// SPDX-License-Identifier: Apache-2.0
// The CUDA implementations of torch.ops.bop2nd.*: from tensors to the problems of csrc/cuda. Knows torch
// through its stable ABI and the kernels through cuda/launch.h, and needs neither CUDA's nor torch's CUDA
// headers. Built into a library of its own, bop2nd_fast._C_cuda, because it only loads where torch has CUDA.
//
// Work goes to the current stream of the tensors' device; nothing waits for the device, so every operator can
// be captured in a graph. Users' mistakes are reported in bop2nd_fast/ops, the checks here only guard memory.
// Tests build it with BOP2ND_EMULATED: kernels on emulated blocks, registered for host tensors.
#define USE_CUDA  // declares the shim that names the current stream
#include "register_product.h"
#include "register_step.h"

#include <torch/csrc/stable/accelerator.h>

#include <atomic>

#include "cuda/launch.h"

#ifdef BOP2ND_EMULATED
#define BOP2ND_NAMESPACE bop2nd_emulated
#define BOP2ND_DEVICE CPU
#define BOP2ND_MODULE_INIT PyInit__C_emulated
#else
#define BOP2ND_NAMESPACE bop2nd
#define BOP2ND_DEVICE CUDA
#define BOP2ND_MODULE_INIT PyInit__C_cuda
#endif

namespace bop2nd::cuda {
namespace {

using namespace bop2nd::binding;

std::atomic<int64_t> n_calls{0};  // of operators

// The device of a tensor, made current while this lives, and its current stream.
struct Place {
#ifdef BOP2ND_EMULATED
  explicit Place(const Tensor&) { ++n_calls; }
  int device = 0;
  Stream stream = nullptr;
#else
  explicit Place(const Tensor& t) : device(index_of(t)), guard(device) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    ++n_calls;
  }
  int device;
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream = nullptr;

 private:
  // The dispatcher comes here as soon as one of the operands is on a GPU; this one need not be.
  static int index_of(const Tensor& t) {
    BOP2ND_REQUIRE(t.is_cuda(), "the first operand must be on the GPU, as another one is");
    return t.get_device_index();
  }
#endif
};

void check(Error error, const char* what) { STD_TORCH_CHECK(error == nullptr, what, ": ", error); }

// ---------------------------------------------------------------------------------------------- step

StepTensor step_tensor(const StepOperand& operand, int32_t index) {
  StepTensor t{};
  t.weight = operand.weight;
  t.grad = operand.grad;
  t.exp_avg = operand.exp_avg;
  t.exp_avg_sq = operand.exp_avg_sq;
  t.n_words = operand.rows * words_for(operand.length);
  t.length = operand.length;
  t.index = index;
  t.weight_type = operand.weight_type;
  t.grad_type = operand.grad_type;
  t.flat = step_is_flat(t, operand.state_type);
  BOP2ND_REQUIRE(t.n_words <= kMaxInt32, "a tensor of more than 2^31 - 1 words");
  return t;
}

void step(const Tensor& hyper, const StepRequest& request) {
  if (request.operands.empty()) return;
  Place place(hyper);
  StepBatch batch;
  batch.hyper = request.hyper;
  batch.inv_scale = request.inv_scale;
  batch.found_inf = request.found_inf;
  batch.seed = request.seed;
  batch.counts = request.counts;
  batch.maximize = request.maximize;
  batch.second_moment = request.second_moment;

  std::array<std::vector<StepTensor>, 2> by_state;  // fp32 and bf16 moments are different kernels
  int32_t index = 0;
  for (const StepOperand& operand : request.operands) {
    StepTensor tensor = step_tensor(operand, index++);
    if (tensor.n_words > 0) by_state[operand.state_type == Dtype::kBFloat16 ? 1 : 0].push_back(tensor);
  }
  check(clear_memory(batch.counts, index * int64_t{2 * sizeof(int64_t)}, place.stream), "bop_step_");
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

// ------------------------------------------------------------------------------------------- packing

void pack(const Tensor& x, const PackView& view, uint32_t* signs, uint32_t* mask) {
  Place place(x);
  int64_t n_words = times(view.outer.size, view.inner.size) * view.groups * words_for(view.length);
  if (n_words == 0) return;
  int64_t row = view.groups * view.length;
  BOP2ND_REQUIRE(n_words <= kMaxInt32 && row <= kMaxInt32, "more than 2^31 - 1 words");
  PackProblem p = PackProblem::of(view.outer.size, view.inner.size, view.groups, view.length);
  p.x = x.const_data_ptr();
  p.type = view.dtype;
  p.signs = signs;
  p.mask = mask;
  p.length_stride = view.length_stride;
  p.group_stride = view.group_stride;
  p.outer_stride = view.outer.size == 1 ? view.inner.size * row : view.outer.stride;
  p.inner_stride = view.inner.size == 1 ? row : view.inner.stride;
  p.choose_path();
  check(launch_pack(p, place.stream), "pack_bits");
}

constexpr PackTensor pack_tensor = pack_axis<pack, false>;

UnpackProblem problem_of(const Rows& rows) {
  UnpackProblem p;
  p.words = rows.words;
  p.elements = rows.elements;
  p.type = rows.dtype;
  p.n_rows = rows.n;
  p.length = rows.length;
  BOP2ND_REQUIRE(p.n_blocks() <= kMaxInt32, "too many elements at once");
  return p;
}

void unpack(const Tensor& elements, const Rows& rows) {
  Place place(elements);
  if (rows.n > 0) check(launch_unpack(problem_of(rows), place.stream), "unpack_bits");
}

void apply_mask(const Tensor& grad, const Rows& rows) {
  Place place(grad);
  if (rows.n > 0) check(launch_mask(problem_of(rows), place.stream), "apply_mask_");
}

// -------------------------------------------------------------------------------- linear, convolution

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
  BOP2ND_REQUIRE(plan.n_blocks() <= kMaxInt32, "more than 2^31 - 1 blocks");
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
  m.impl("bop_step_", TORCH_BOX(&bop_step_<step>));
  m.impl("pack_bits", TORCH_BOX(&pack_bits<pack_tensor>));
  m.impl("pack_bits_ste", TORCH_BOX(&pack_bits_ste<pack_tensor>));
  m.impl("unpack_bits", TORCH_BOX(&unpack_bits<unpack>));
  m.impl("apply_mask_", TORCH_BOX(&apply_mask_<apply_mask>));
  m.impl("binary_linear", TORCH_BOX((&linear<compute, pack_tensor>)));
  m.impl("binary_conv2d", TORCH_BOX((&conv2d<compute, pack_tensor, compute_planes>)));
  m.impl("binary_linear_packed", TORCH_BOX(&linear_packed<compute>));
  m.impl("binary_conv2d_packed", TORCH_BOX(&conv2d_packed<compute>));
}

// ---------------------------- control symbols for bop2nd_fast/cuda_library.py (ctypes)

// Operator calls served so far; tests check that what they forced really ran.
BOP2ND_EXPORT int64_t bop2nd_cuda_calls(void) { return bop2nd::cuda::n_calls.load(); }

// Why the kernels cannot run on the current device `device` (no code for it, say), or null if they can.
BOP2ND_EXPORT const char* bop2nd_cuda_unusable(int device) {
  bop2nd::cuda::Chip chip;
  return bop2nd::cuda::chip_of(device, &chip);
}

// Enqueues the product kernels' instruction back to back on the current device `device`; returns the
// multiply-accumulates it stands for, or -1. `out`: device memory of one int32. For benchmarks.
BOP2ND_EXPORT double bop2nd_cuda_mma_peak(void* out, int n_iterations, int device, void* stream) {
  double n_macs = 0;
  auto error =
      bop2nd::cuda::launch_mma_peak(static_cast<int32_t*>(out), n_iterations, device, &n_macs, stream);
  return error ? -1.0 : n_macs;
}

PyMODINIT_FUNC BOP2ND_MODULE_INIT(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
