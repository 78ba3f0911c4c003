// SPDX-License-Identifier: Apache-2.0
// The CPU implementations of torch.ops.bop2nd.*: from tensors to plain memory. Knows torch through its
// stable ABI (register_tensor.h). Schemas live in bop2nd_fast/ops; users' mistakes are reported there, the
// checks here only guard memory.
#include "core/rounding.h"
#include "cpu/operators.h"
#include "cpu/parallel.h"
#include "register_product.h"
#include "register_signed.h"
#include "register_step.h"

#include <atomic>

namespace {

using bop2nd::ConvShape;
using bop2nd::Dtype;
using namespace bop2nd::binding;

Dtype real_dtype(const Tensor& t, const char* what) { return real_type<Dtype>(t.scalar_type(), what); }

// ------------------------------------------------------------------------------------- step, packing

void step(const Tensor&, const StepRequest& request) {
  const float* h = request.hyper;
  float scale = request.inv_scale ? *request.inv_scale : 1.0f;
  bop2nd::StepHyper constants{
      .gamma = h[0], .sigma = h[1], .a = h[2], .b = h[3], .grad_scale = request.maximize ? -scale : scale};
  bool skip = request.found_inf && *request.found_inf != 0.0f;
  std::vector<StepOperand> operands = request.operands;
  for (size_t i = 0; i < operands.size(); ++i) {
    StepOperand& t = operands[i];
    if (skip) t.rows = t.length = 0;
    if (t.state_type != Dtype::kFloat32)
      t.key = bop2nd::rounding_key(request.seed[0], request.seed[1], static_cast<int64_t>(i));
  }
  bop2nd::bop_step(operands, constants, request.counts);
}

void pack(const Tensor& x, const PackView& view, uint32_t* signs, uint32_t* mask) {
  bop2nd::PackShape shape{.dtype = view.dtype,
                          .n_outer = view.outer.size,
                          .outer_stride = view.outer.stride,
                          .n_groups = view.groups,
                          .group_stride = view.group_stride,
                          .length = view.length,
                          .length_stride = view.length_stride,
                          .n_inner = view.inner.size,
                          .inner_stride = view.inner.stride};
  bop2nd::pack(shape, x.const_data_ptr(), signs, mask);
}

constexpr PackTensor pack_tensor = pack_axis<pack, true>;

void unpack(const Tensor&, const Rows& rows) {
  bop2nd::unpack(rows.words, rows.n, rows.length, rows.dtype, rows.elements);
}

void apply_mask(const Tensor&, const Rows& rows) {
  bop2nd::apply_mask(rows.words, rows.n, rows.length, rows.dtype, rows.elements);
}

// -------------------------------------------------------------------------------- linear, convolution

Tensor prepack_weight(const Tensor weight, int64_t groups) {
  check_words(weight, "weight");
  BOP2ND_REQUIRE(weight.dim() > 0 && groups <= bop2nd::kMaxInt32,
                 "weight needs at least one axis, and groups must be below 2**31");
  check_extent(weight, "weight");
  int64_t outputs = weight.size(0);
  BOP2ND_REQUIRE(groups > 0 && outputs % groups == 0, "groups=", groups, " does not divide ", outputs,
                 " outputs");
  Tensor w = compact(weight);
  int64_t row_words = outputs > 0 ? w.numel() / outputs : 0;
  int64_t n_blocks = (outputs / groups + 15) / 16;
  Tensor blocked = new_tensor(w, {groups, times(n_blocks * 16, row_words)}, ScalarType::Int);
  if (w.numel() > 0) bop2nd::prepack_weight(const_words_of(w), outputs, groups, row_words, words_of(blocked));
  return blocked;
}

Tensor blocked_or_new(const Tensor& weight, int64_t groups, const MaybeTensor& blocked) {
  if (!blocked) return prepack_weight(weight, groups);
  check_words(*blocked, "blocked");
  int64_t row_words = weight.size(0) > 0 ? weight.numel() / weight.size(0) : 0;
  int64_t n_blocks = (weight.size(0) / groups + 15) / 16;
  BOP2ND_REQUIRE(blocked->numel() == groups * n_blocks * row_words * 16,
                 "blocked does not belong to this weight");
  return compact(*blocked);
}

void compute(const ConvShape& s, const Tensor& x_words, const Tensor& weight, const MaybeTensor& blocked,
             const bop2nd::Epilogue& to) {
  Tensor w = blocked_or_new(weight, s.groups, blocked);
  bop2nd::binary_conv(s, const_words_of(x_words), const_words_of(w), to);
}

void compute_planes(const ConvShape& s, const Tensor& signs, const Tensor& weight, const MaybeTensor& blocked,
                    const Tensor& out) {
  Tensor w = blocked_or_new(weight, s.groups, blocked);
  bop2nd::binary_conv_planes(s, const_words_of(signs), const_words_of(w), real_dtype(out, "output"),
                             out.mutable_data_ptr());
}

// ----------------------------------------------------------------------------------------- gradients

// Into grad_input and grad_weight, in walk order, whichever is needed.
void gradients(const ConvShape& s, const Tensor& grad, const Tensor& signs, const Tensor& mask,
               const Tensor& weight, const Tensor& grad_input, const Tensor& grad_weight, bool need_input,
               bool need_weight) {
  Dtype dtype = real_dtype(grad, "grad_output");

  Tensor g = compact(grad), x = compact(signs), inside = compact(mask), w = compact(weight);
  if (need_input)
    bop2nd::conv_input_gradient(s, dtype, g.const_data_ptr(), const_words_of(w),
                                inside.numel() > 0 ? const_words_of(inside) : nullptr,
                                grad_input.mutable_data_ptr());
  if (need_weight)
    bop2nd::conv_weight_gradient(s, dtype, g.const_data_ptr(), const_words_of(x),
                                 static_cast<float*>(grad_weight.mutable_data_ptr()));
}

// [N, C, H, W] -> [N, H, W, C], from planes; and back, from pixels.
Tensor pixels_of(const Tensor& image) {
  Tensor planes = compact(image);
  int64_t batch = image.size(0), channels = image.size(1), height = image.size(2), width = image.size(3);
  Tensor pixels = new_tensor(image, {batch, height, width, channels}, image.scalar_type());
  bop2nd::transpose_images(real_dtype(image, "grad_output"), planes.const_data_ptr(), batch, channels,
                           height * width, pixels.mutable_data_ptr());
  return pixels;
}

Tensor planes_of(const Tensor& image) {
  Tensor planes = new_tensor(image, sizes_of(image), image.scalar_type());
  bop2nd::transpose_images(real_dtype(image, "grad_input"), image.const_data_ptr(), image.size(0),
                           image.size(2) * image.size(3), image.size(1), planes.mutable_data_ptr());
  return planes;
}

std::tuple<Tensor, Tensor> binary_linear_backward(const Tensor grad_output, const Tensor signs,
                                                  const Tensor mask, const Tensor weight, int64_t in_features,
                                                  bool need_input, bool need_weight) {
  BOP2ND_REQUIRE(grad_output.dim() > 0, "grad_output needs at least one axis");
  check_extent(signs, "signs");
  Ints sizes = sizes_of(grad_output);
  auto s = linear_shape(product(sizes, 0, sizes.size() - 1), in_features, weight);
  sizes.back() = s.out_channels;
  Ints saved = sizes;
  saved.back() = s.group_words();
  check_saved(grad_output, sizes, signs, mask, saved);
  sizes.back() = in_features;
  Tensor grad_input =
      new_tensor(grad_output, need_input ? sizes : Ints{0, in_features}, grad_output.scalar_type());
  Tensor grad_weight =
      new_tensor(grad_output, {need_weight ? s.out_channels : 0, in_features}, ScalarType::Float);
  gradients(s, grad_output, signs, mask, weight, grad_input, grad_weight, need_input, need_weight);
  return {grad_input, grad_weight};
}

std::tuple<Tensor, Tensor> binary_conv2d_backward(const Tensor grad_output, const Tensor signs,
                                                  const Tensor mask, const Tensor weight, int64_t in_channels,
                                                  BOP2ND_GEOMETRY, bool need_input, bool need_weight) {
  BOP2ND_REQUIRE(grad_output.dim() == 4 && signs.dim() == 4,
                 "grad_output must be [N, O, Ho, Wo] and signs [N, H, W, words]");
  auto s =
      conv_shape(signs.size(0), signs.size(1), signs.size(2), in_channels, weight, BOP2ND_GEOMETRY_ARGUMENTS);
  check_saved(grad_output, {s.batch, s.out_channels, s.out_size(0), s.out_size(1)}, signs, mask,
              {s.batch, s.height, s.width, s.groups * s.group_words()});
  bool planes = !is_channels_last(grad_output);
  Tensor grad = planes ? pixels_of(grad_output) : move_axis(grad_output, 1, -1);
  Tensor grad_input = new_channels_last(
      grad_output, {need_input ? s.batch : 0, s.channels, s.height, s.width}, grad_output.scalar_type());
  Tensor grad_weight = new_channels_last(
      grad_output, {need_weight ? s.out_channels : 0, s.group_channels(), s.kernel[0], s.kernel[1]},
      ScalarType::Float);
  gradients(s, grad, signs, mask, weight, grad_input, grad_weight, need_input, need_weight);
  if (planes && need_input) grad_input = planes_of(grad_input);
  return {grad_input, grad_weight};
}

// --------------------------------------------------------------------------------------- torch's threads

void torch_parallel_for(void*, int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*),
                        void* context) {
  TORCH_ERROR_CODE_CHECK(::torch_parallel_for(0, n, grain, body, context));
}

int torch_threads(void*) { return static_cast<int>(torch::stable::get_num_threads()); }

// ------------------------------------------------------------------------------- forced backends in Python

std::atomic<bool> hands_on{false};
thread_local std::string told;  // by the Python function that failed: the stable ABI reports no texts

bool handed_on(const char* op, StableIValue* stack) {
  if (!hands_on.load(std::memory_order_relaxed)) return false;
  told.clear();
  STD_TORCH_CHECK(torch_call_dispatcher(op, "", stack, TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS, told);
  return true;
}

}  // namespace

// Another backend can be forced while calls run in other threads (bop2nd_fast/backends.py), so no
// registration ever changes: each kernel asks whether it is to hand its operands on to the same operator of
// `bop2nd_python`.
#define BOP2ND_IMPL(m, op, function)                                                                   \
  m.impl(#op, [](StableIValue* stack, uint64_t n_operands, uint64_t n_results) {                       \
    if (!handed_on("bop2nd_python::" #op, stack)) TORCH_BOX (&function)(stack, n_operands, n_results); \
  })

STABLE_TORCH_LIBRARY_IMPL(bop2nd, CPU, m) {
  BOP2ND_IMPL(m, bop_step_, bop_step_<step>);
  BOP2ND_IMPL(m, pack_bits, pack_bits<pack_tensor>);
  BOP2ND_IMPL(m, pack_bits_ste, pack_bits_ste<pack_tensor>);
  BOP2ND_IMPL(m, unpack_bits, unpack_bits<unpack>);
  BOP2ND_IMPL(m, apply_mask_, apply_mask_<apply_mask>);
  BOP2ND_IMPL(m, prepack_weight, prepack_weight);
  BOP2ND_IMPL(m, binary_linear, (linear<compute, pack_tensor>));
  BOP2ND_IMPL(m, binary_conv2d, (conv2d<compute, pack_tensor, compute_planes>));
  BOP2ND_IMPL(m, binary_linear_backward, binary_linear_backward);
  BOP2ND_IMPL(m, binary_conv2d_backward, binary_conv2d_backward);
  BOP2ND_IMPL(m, binary_linear_packed, linear_packed<compute>);
  BOP2ND_IMPL(m, binary_conv2d_packed, conv2d_packed<compute>);
  BOP2ND_IMPL(m, quantize_rows, bop2nd::binding::quantize_rows);
  BOP2ND_IMPL(m, signed_linear, bop2nd::binding::signed_linear);
  BOP2ND_IMPL(m, signed_conv2d, bop2nd::binding::signed_conv2d);
}

BOP2ND_EXPORT void bop2nd_tell(const char* error) { told = error; }

BOP2ND_EXPORT void bop2nd_hand_on(int wanted) { hands_on.store(wanted != 0, std::memory_order_relaxed); }

PyMODINIT_FUNC PyInit__C(void) {
  bop2nd::install_pool({.parallel_for = torch_parallel_for, .n_threads = torch_threads});
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
