// SPDX-License-Identifier: Apache-2.0
// Packing, unpacking and masks for CPU and CUDA: operands checked and described, then handed to a device.
#pragma once

#include "core/conv_shape.h"
#include "core/dtype.h"
#include "register_tensor.h"

namespace bop2nd::binding {

// A tensor seen as [outer, inner, groups, length] with element strides; it is packed along `length`.
struct PackView {
  Dtype dtype{};
  Axes outer{.size = 0}, inner{.size = 0};
  int64_t groups = 1, group_stride = 0, length = 0, length_stride = 1;

  static PackView of(const Tensor& x, int64_t dim, int64_t groups) {
    int64_t length = x.size(dim) / groups;
    return {.dtype = real_type<Dtype>(x.scalar_type(), "the tensor to pack"),
            .outer = Axes::of(x, 0, dim),
            .inner = Axes::of(x, dim + 1, x.dim()),
            .groups = groups,
            .group_stride = length * x.stride(dim),
            .length = length,
            .length_stride = length == 1 ? 1 : x.stride(dim)};
  }
  bool uniform() const { return outer.uniform && inner.uniform; }
};

// Words in the order of the view, every group to whole words; `mask` may be null.
using Pack = void (*)(const Tensor& x, const PackView&, uint32_t* signs, uint32_t* mask);

// Rows of `length` elements, and their words.
struct Rows {
  int64_t n, length;
  Dtype dtype;
  void* elements;
  const uint32_t* words;

  static Rows of(const Tensor& elements, const Tensor& words, int64_t length, const char* what) {
    return {.n = length > 0 ? elements.numel() / length : 0,
            .length = length,
            .dtype = real_type<Dtype>(elements.scalar_type(), what),
            .elements = elements.mutable_data_ptr(),
            .words = const_words_of(words)};
  }
};
using OnRows = void (*)(const Tensor& elements, const Rows&);

// (signs, mask or an empty tensor) along an axis, which comes last, on one device.
using PackTensor = std::tuple<Tensor, Tensor> (*)(const Tensor&, int64_t dim, int64_t groups, bool with_mask);

// kUnitStride: the device needs elements along the packed axis, or else pixels, to be neighbours in memory.
template <Pack pack, bool kUnitStride>
std::tuple<Tensor, Tensor> pack_axis(const Tensor& input, int64_t dim, int64_t groups, bool with_mask) {
  BOP2ND_REQUIRE(input.dim() > 0, "the tensor to pack needs at least one axis");
  dim = normal_dim(dim, input.dim());
  BOP2ND_REQUIRE(groups > 0 && groups <= kMaxInt32 && input.size(dim) % groups == 0, "groups=", groups,
                 " does not divide the packed axis of ", input.size(dim));
  check_extent(input, "the tensor to pack");
  PackView view;
  view.dtype = real_type<Dtype>(input.scalar_type(), "the tensor to pack");
  Tensor x = input;
  if (x.numel() > 0) {
    view = PackView::of(x, dim, groups);
    bool readable = !kUnitStride || view.length_stride == 1 || view.inner.stride == 1;
    if (!view.uniform() || !readable) {
      x = torch::stable::contiguous(input);
      view = PackView::of(x, dim, groups);
    }
  }
  Ints sizes = sizes_of(x);
  sizes.erase(sizes.begin() + dim);
  sizes.push_back(groups * words_for(x.size(dim) / groups));
  Tensor signs = new_tensor(x, sizes, ScalarType::Int);
  Tensor mask = new_tensor(x, with_mask ? sizes : Ints{0}, ScalarType::Int);
  pack(x, view, words_of(signs), with_mask ? words_of(mask) : nullptr);
  return {signs, mask};
}

template <PackTensor pack_tensor>
Tensor pack_bits(const Tensor input, int64_t dim) {
  return std::get<0>(pack_tensor(input, dim, 1, false));
}

template <PackTensor pack_tensor>
std::tuple<Tensor, Tensor> pack_bits_ste(const Tensor input, int64_t dim, int64_t groups) {
  return pack_tensor(input, dim, groups, true);
}

template <OnRows unpack>
Tensor unpack_bits(const Tensor words, int64_t length, int64_t dim, ScalarType dtype) {
  check_words(words, "words");
  BOP2ND_REQUIRE(words.dim() > 0 && length >= 0 && words.size(words.dim() - 1) == words_for(length),
                 "length ", length, " does not fit the words");
  check_extent(words, "words");
  bool direct = dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  bool known = direct || dtype == ScalarType::Double || dtype == ScalarType::Char ||
               dtype == ScalarType::Short || dtype == ScalarType::Int || dtype == ScalarType::Long;
  BOP2ND_REQUIRE(known, "dtype must be a real floating or signed integer type, got ",
                 torch::headeronly::toString(dtype));
  Tensor w = compact(words);
  Ints sizes = sizes_of(w);
  sizes.back() = length;
  Tensor out = new_tensor(w, sizes, direct ? dtype : ScalarType::Float);
  unpack(out, Rows::of(out, w, length, "dtype"));
  if (!direct) out = torch::stable::to(out, dtype);
  return normal_dim(dim, out.dim()) == out.dim() - 1 ? out : move_axis(out, -1, dim);
}

template <OnRows apply_mask>
void apply_mask_(const Tensor grad, const Tensor mask) {
  check_words(mask, "mask");
  check_beside(grad, mask, "mask");
  BOP2ND_REQUIRE(grad.dim() > 0 && grad.is_contiguous(), "grad must be contiguous in walk order");
  Ints sizes = sizes_of(grad);
  int64_t length = sizes.back();
  sizes.back() = words_for(length);
  check_sizes(mask, sizes, "mask");
  check_extent(grad, "grad");
  Tensor words = compact(mask);
  apply_mask(grad, Rows::of(grad, words, length, "grad"));
}

}  // namespace bop2nd::binding
