// SPDX-License-Identifier: Apache-2.0
// The CUDA C++ implementations of torch.ops.bop2nd.*: from tensors to the problems of csrc/cuda. Knows torch
// through its stable ABI and the kernels through cuda/launch.h; needs neither CUDA's nor torch's CUDA
// headers. Built into a library of its own, bop2nd_fast._C_cuda, because it only loads where torch has CUDA.
//
// Work goes to the current stream of the tensors' device; nothing waits for the device, so every operator can
// be captured in a graph. Users' mistakes are reported in bop2nd_fast/ops, the checks here only guard memory.
// Tests build it with BOP2ND_EMULATED: kernels on emulated blocks, registered for host tensors.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#define USE_CUDA  // declares the shim that names the current stream
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/launch.h"

#ifdef BOP2ND_EMULATED
#define BOP2ND_NAMESPACE bop2nd_emulated
#define BOP2ND_DEVICE CPU
#else
#define BOP2ND_NAMESPACE bop2nd
#define BOP2ND_DEVICE CUDA
#endif

namespace bop2nd::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kMax32 = std::numeric_limits<int32_t>::max();
std::atomic<int64_t> n_calls{0};

// ------------------------------------------------------------------------------------------ tensors

// The device of a tensor, made current while this lives, and its current stream.
struct Place {
#ifdef BOP2ND_EMULATED
  explicit Place(const Tensor&) { ++n_calls; }
  int device = 0;
  Stream stream = nullptr;
#else
  explicit Place(const Tensor& t) : device(t.get_device_index()), guard(device) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    ++n_calls;
  }
  int device;
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream = nullptr;
#endif
};

void check(Error error, const char* what) { STD_TORCH_CHECK(error == nullptr, what, ": ", error); }

Value real_type(ScalarType dtype, const char* what) {
  switch (dtype) {
    case ScalarType::Float:
      return Value::kFloat32;
    case ScalarType::BFloat16:
      return Value::kBFloat16;
    case ScalarType::Half:
      return Value::kFloat16;
    default:
      STD_TORCH_CHECK(false, what, " must be float32, bfloat16 or float16");
  }
}

void check_words(const Tensor& t, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int, what, " must be int32 words");
}

// Also that a tensor lies where the first operand of the operator lies.
void check_beside(const Tensor& first, const Tensor& other, const char* what) {
  STD_TORCH_CHECK(first.get_device_index() == other.get_device_index() && first.is_cuda() == other.is_cuda(),
                  what, " must be on the same device as the other operands");
}

Tensor compact(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor new_tensor(const Tensor& like, const Ints& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

const uint32_t* words_of(const Tensor& t) { return static_cast<const uint32_t*>(t.const_data_ptr()); }

Ints sizes_of(const Tensor& t) {
  auto sizes = t.sizes();
  return Ints(sizes.begin(), sizes.end());
}

int64_t product(const Ints& sizes, size_t begin, size_t end) {
  int64_t n = 1;
  for (size_t i = begin; i < end; ++i) n *= sizes[i];
  return n;
}

int64_t normal_dim(int64_t dim, int64_t n_dims) {
  STD_TORCH_CHECK(dim >= -n_dims && dim < n_dims, "dim ", dim, " does not exist in a tensor of ", n_dims,
                  " axes");
  return dim < 0 ? dim + n_dims : dim;
}

Tensor movedim(const Tensor& t, int64_t from, int64_t to) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(t), torch::stable::detail::from(from),
                                    torch::stable::detail::from(to)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::movedim", "int", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// ---------------------------------------------------------------------------------------------- step

const void* one_number(const Tensor& first, const MaybeTensor& t, int64_t n, ScalarType dtype,
                       const char* what) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->numel() == n && t->scalar_type() == dtype && t->is_contiguous(), what, " must be ", n,
                  dtype == ScalarType::Float ? " float32 values" : " int64 values");
  check_beside(first, *t, what);
  return t->const_data_ptr();
}

StepTensor step_tensor(const Tensor& weight, const Tensor& grad, const Tensor& m, const Tensor* v) {
  StepTensor t{};
  bool packed = weight.scalar_type() == ScalarType::Int;
  t.weight_type = packed ? Value::kPacked : real_type(weight.scalar_type(), "a dense weight");
  t.grad_type = real_type(grad.scalar_type(), "a gradient");
  STD_TORCH_CHECK(weight.is_contiguous() && grad.is_contiguous() && m.is_contiguous(),
                  "weights, gradients and moments must be contiguous in walk order");
  STD_TORCH_CHECK(grad.numel() == m.numel(), "gradient and exp_avg differ in size");
  if (v) {
    STD_TORCH_CHECK(v->is_contiguous() && v->numel() == m.numel() && v->scalar_type() == m.scalar_type(),
                    "exp_avg_sq must be like exp_avg");
    t.exp_avg_sq = v->mutable_data_ptr();
  }
  t.length = grad.numel();
  t.n_words = words_for(t.length);
  if (packed && t.length > 0) {
    STD_TORCH_CHECK(grad.dim() > 0, "the gradient of a packed weight needs at least one axis");
    t.length = grad.size(grad.dim() - 1);
    t.n_words = grad.numel() / t.length * words_for(t.length);
    STD_TORCH_CHECK(weight.numel() == t.n_words, "words do not fit the gradient");
  } else if (!packed) {
    STD_TORCH_CHECK(weight.numel() == t.length, "weight and gradient differ in size");
  }
  STD_TORCH_CHECK(t.n_words <= kMax32, "a tensor of more than 2^31 - 1 words");
  t.weight = weight.mutable_data_ptr();
  t.grad = grad.const_data_ptr();
  t.exp_avg = m.mutable_data_ptr();
  return t;
}

void bop_step_(const Tensors weights, const Tensors grads, const Tensors exp_avgs, const Tensors exp_avg_sqs,
               const Tensor hyper, const Tensor counts, const MaybeTensor inv_scale,
               const MaybeTensor found_inf, const MaybeTensor seed, bool maximize) {
  size_t n = weights.size();
  STD_TORCH_CHECK(
      grads.size() == n && exp_avgs.size() == n && (exp_avg_sqs.empty() || exp_avg_sqs.size() == n),
      "weights, grads and moments must be lists of one length");
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
    Value state = real_type(exp_avgs[i].scalar_type(), "exp_avg");
    STD_TORCH_CHECK(state != Value::kFloat16, "moments must be float32 or bfloat16");
    STD_TORCH_CHECK(state == Value::kFloat32 || batch.seed, "bfloat16 moments need a seed");
    tensor.index = static_cast<int32_t>(i);
    tensor.flat = step_is_flat(tensor, state);
    if (tensor.n_words > 0) by_state[state == Value::kBFloat16 ? 1 : 0].push_back(tensor);
  }
  check(clear_memory(batch.counts, static_cast<int64_t>(2 * n * sizeof(int64_t)), place.stream), "bop_step_");
  for (int state = 0; state < 2; ++state) {
    const std::vector<StepTensor>& tensors = by_state[static_cast<size_t>(state)];
    batch.state_type = state ? Value::kBFloat16 : Value::kFloat32;
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

struct Axes {  // some neighbouring axes seen as one
  int64_t size = 1, stride = 1;
  bool uniform = true;

  void absorb(int64_t axis_size, int64_t axis_stride) {  // the next axis inwards
    if (axis_size == 1) return;
    if (size > 1 && stride != axis_size * axis_stride) uniform = false;
    size *= axis_size;
    stride = axis_stride;
  }
};

// x seen as [outer, inner, groups, length]; false if its axes cannot be merged as they lie in memory.
bool describe(const Tensor& x, int64_t dim, int64_t groups, PackProblem* p) {
  Axes outer, inner;
  for (int64_t i = 0; i < dim; ++i) outer.absorb(x.size(i), x.stride(i));
  for (int64_t i = dim + 1; i < x.dim(); ++i) inner.absorb(x.size(i), x.stride(i));
  int64_t length = x.size(dim) / groups;
  *p = PackProblem::of(outer.size, inner.size, groups, length);
  p->length_stride = length == 1 ? 1 : x.stride(dim);
  p->group_stride = length * x.stride(dim);
  p->outer_stride = outer.size == 1 ? inner.size * groups * length : outer.stride;
  p->inner_stride = inner.size == 1 ? groups * length : inner.stride;
  return outer.uniform && inner.uniform;
}

// Packs x along dim; returns (signs, mask or an empty tensor), the packed axis last.
std::tuple<Tensor, Tensor> pack_tensor(const Tensor& input, int64_t dim, int64_t groups, bool with_mask) {
  Place place(input);
  dim = normal_dim(dim, input.dim());
  STD_TORCH_CHECK(groups > 0 && input.size(dim) % groups == 0, "groups must divide the packed axis");
  Value type = real_type(input.scalar_type(), "the tensor to pack");
  Ints sizes = sizes_of(input);
  int64_t row_words = words_for(input.size(dim) / groups);
  sizes.erase(sizes.begin() + dim);
  sizes.push_back(groups * row_words);
  Tensor signs = new_tensor(input, sizes, ScalarType::Int);
  Tensor mask = new_tensor(input, with_mask ? sizes : Ints{0}, ScalarType::Int);
  if (signs.numel() == 0) return {signs, mask};
  STD_TORCH_CHECK(signs.numel() <= kMax32 && input.size(dim) <= kMax32, "more than 2^31 - 1 words");
  PackProblem p;
  Tensor x = input;
  if (!describe(x, dim, groups, &p)) {
    x = torch::stable::contiguous(input);
    describe(x, dim, groups, &p);
  }
  p.x = x.const_data_ptr();
  p.type = type;
  p.signs = static_cast<uint32_t*>(signs.mutable_data_ptr());
  p.mask = with_mask ? static_cast<uint32_t*>(mask.mutable_data_ptr()) : nullptr;
  p.choose_path();
  check(launch_pack(p, place.stream), "pack_bits");
  return {signs, mask};
}

Tensor pack_bits(const Tensor input, int64_t dim) { return std::get<0>(pack_tensor(input, dim, 1, false)); }

std::tuple<Tensor, Tensor> pack_bits_ste(const Tensor input, int64_t dim, int64_t groups) {
  return pack_tensor(input, dim, groups, true);
}

Tensor unpack_bits(const Tensor words, int64_t length, int64_t dim, ScalarType dtype) {
  Place place(words);
  check_words(words, "words");
  STD_TORCH_CHECK(words.dim() > 0 && length >= 0 && words.size(words.dim() - 1) == words_for(length),
                  "length ", length, " does not fit the words");
  Tensor w = compact(words);
  bool direct = dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  Ints sizes = sizes_of(w);
  sizes.back() = length;
  Tensor out = new_tensor(w, sizes, direct ? dtype : ScalarType::Float);
  UnpackProblem p;
  p.words = words_of(w);
  p.elements = out.mutable_data_ptr();
  p.type = real_type(out.scalar_type(), "dtype");
  p.n_rows = product(sizes, 0, sizes.size() - 1);
  p.length = length;
  STD_TORCH_CHECK(p.n_blocks() <= kMax32, "too many elements to unpack at once");
  if (out.numel() > 0) check(launch_unpack(p, place.stream), "unpack_bits");
  if (!direct) out = torch::stable::to(out, dtype);
  return normal_dim(dim, out.dim()) == out.dim() - 1 ? out : movedim(out, -1, dim);
}

void apply_mask_(const Tensor grad, const Tensor mask) {
  Place place(grad);
  check_words(mask, "mask");
  check_beside(grad, mask, "mask");
  STD_TORCH_CHECK(grad.dim() > 0 && mask.dim() == grad.dim() && grad.is_contiguous(),
                  "grad must be contiguous in walk order and have as many axes as mask");
  Ints sizes = sizes_of(grad);
  UnpackProblem p;
  p.type = real_type(grad.scalar_type(), "grad");
  p.n_rows = product(sizes, 0, sizes.size() - 1);
  p.length = sizes.back();
  STD_TORCH_CHECK(mask.numel() == p.n_rows * words_for(p.length), "mask words do not fit the gradient");
  if (grad.numel() == 0) return;
  Tensor words = compact(mask);
  p.words = words_of(words);
  p.elements = grad.mutable_data_ptr();
  STD_TORCH_CHECK(p.n_blocks() <= kMax32, "too many elements to mask at once");
  check(launch_mask(p, place.stream), "apply_mask_");
}

// -------------------------------------------------------------------------------- linear, convolution

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
    check_size(std::max(size, stride[i]), "pixels along one axis");
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
  check_beside(x, weight, "weight");
  Place place(x);
  Tensor w = compact(weight);
  DeviceTraits traits;
  check(device_traits(place.device, &traits), "binary product");
  MatmulPlan plan =
      plan_matmul(shape, static_cast<int>(padding_value), traits.math, traits.n_multiprocessors);
  plan.fit_alignment(words_of(x), words_of(w));
  check_size(plan.n_blocks(), "blocks");
  Tensor scratch = new_tensor(x, {plan.scratch_words()}, ScalarType::Int);
  int32_t* memory = plan.scratch_words() ? static_cast<int32_t*>(scratch.mutable_data_ptr()) : nullptr;
  if (int64_t n = plan.partial_words + plan.arrival_words) {
    check(clear_memory(memory + plan.zero_begin(), n * 4, place.stream), "binary product");
  }
  MatmulProblem problem = problem_of(plan, shape, words_of(x), words_of(w), memory, epilogue);
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
  e.value_type = real_type(out.scalar_type(), "output");
  return e;
}

std::tuple<Tensor, Tensor, Tensor> binary_linear(const Tensor input, const Tensor weight, bool ste_clip,
                                                 const MaybeTensor) {
  STD_TORCH_CHECK(input.dim() > 0, "input needs at least one axis");
  Ints sizes = sizes_of(input);
  ConvShape shape = linear_shape(product(sizes, 0, sizes.size() - 1), sizes.back(), weight);
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
  auto [signs, mask] = pack_tensor(input, 1, groups, ste_clip);
  Tensor out =
      new_tensor(input, {s.n_images, s.vertical.out, s.horizontal.out, s.n_outputs()}, input.scalar_type());
  compute(s, padding_value, signs, weight, values_into(out));
  return {movedim(out, -1, 1), signs, mask};
}

// An operand of the epilogue with one number per output (or per value), or null.
const void* operand(const Tensor& x, const MaybeTensor& given, MaybeTensor& keep, int64_t n, ScalarType dtype,
                    const char* what) {
  if (!given) return nullptr;
  STD_TORCH_CHECK(given->numel() == n && given->scalar_type() == dtype, what,
                  " must have one value per output, of the right dtype");
  check_beside(x, *given, what);
  keep = compact(*given);
  return keep->const_data_ptr();
}

// Values and sign words as asked for, the other one empty. `sizes` are those of the values.
std::tuple<Tensor, Tensor> packed_result(const ConvShape& s, int64_t padding_value, Ints sizes,
                                         const Tensor& x, const Tensor& weight, bool with_values,
                                         bool with_signs, const MaybeTensor& threshold,
                                         const MaybeTensor& scale, const MaybeTensor& shift,
                                         const MaybeTensor& residual, ScalarType dtype) {
  STD_TORCH_CHECK((with_values || with_signs) && (with_signs || !threshold),
                  "values or signs: one is needed, and thresholds belong to signs");
  int64_t n_outputs = s.n_outputs(), n_values = product(sizes, 0, sizes.size());
  Tensor values = new_tensor(x, with_values ? sizes : Ints{0}, dtype);
  sizes.back() = words_for(n_outputs);
  Tensor signs = new_tensor(x, with_signs ? sizes : Ints{0}, ScalarType::Int);
  Epilogue e;
  std::array<MaybeTensor, 4> keep;
  e.value_type = real_type(dtype, "dtype");
  e.values = with_values ? values.mutable_data_ptr() : nullptr;
  e.bits = with_signs ? static_cast<uint32_t*>(signs.mutable_data_ptr()) : nullptr;
  e.bit_row_words = static_cast<int>(sizes.back());
  e.threshold =
      static_cast<const int32_t*>(operand(x, threshold, keep[0], n_outputs, ScalarType::Int, "threshold"));
  e.scale = static_cast<const float*>(operand(x, scale, keep[1], n_outputs, ScalarType::Float, "scale"));
  e.shift = static_cast<const float*>(operand(x, shift, keep[2], n_outputs, ScalarType::Float, "shift"));
  e.residual = operand(x, residual, keep[3], n_values, dtype, "residual");
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
  m.impl("bop_step_", TORCH_BOX(&bop_step_));
  m.impl("pack_bits", TORCH_BOX(&pack_bits));
  m.impl("pack_bits_ste", TORCH_BOX(&pack_bits_ste));
  m.impl("unpack_bits", TORCH_BOX(&unpack_bits));
  m.impl("apply_mask_", TORCH_BOX(&apply_mask_));
  m.impl("binary_linear", TORCH_BOX(&binary_linear));
  m.impl("binary_conv2d", TORCH_BOX(&binary_conv2d));
  m.impl("binary_linear_packed", TORCH_BOX(&binary_linear_packed));
  m.impl("binary_conv2d_packed", TORCH_BOX(&binary_conv2d_packed));
}

// Control symbols for bop2nd_fast/backends.py (ctypes).
#define BOP2ND_EXPORT extern "C" __attribute__((visibility("default")))

// Operator calls served so far; tests check that what they forced really ran.
BOP2ND_EXPORT int64_t bop2nd_cuda_calls(void) { return bop2nd::cuda::n_calls.load(); }

// Enqueues the product kernels' instruction back to back on the current device `device`; returns the
// multiply-accumulates it stands for, or -1. `out`: device memory of one int32. For benchmarks.
BOP2ND_EXPORT double bop2nd_cuda_mma_peak(void* out, int n_iterations, int device, void* stream) {
  double n_macs = 0;
  auto error =
      bop2nd::cuda::launch_mma_peak(static_cast<int32_t*>(out), n_iterations, device, &n_macs, stream);
  return error ? -1.0 : n_macs;
}

#ifdef BOP2ND_EMULATED
#define BOP2ND_MODULE_INIT PyInit__C_emulated
#else
#define BOP2ND_MODULE_INIT PyInit__C_cuda
#endif
PyMODINIT_FUNC BOP2ND_MODULE_INIT(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
