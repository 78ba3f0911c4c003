// SPDX-License-Identifier: Apache-2.0
// What the CPU and the CUDA binding share: short words for torch's stable ABI, and checks of operands. The
// only users are register_*.cpp, the only files that know what a torch tensor is.
#pragma once

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

// Symbols that Python reaches by ctypes.
#define BOP2ND_EXPORT extern "C" __attribute__((visibility("default")))

namespace bop2nd::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kMaxExtent = int64_t{1} << 54;

// A mistake of the caller: a ValueError in Python.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}
#define BOP2ND_REQUIRE(kept, ...) \
  if (!(kept)) ::bop2nd::binding::refuse(__VA_ARGS__)

// The library's name for a floating type: Type is an enum with kFloat32, kBFloat16 and kFloat16.
template <class Type>
Type real_type(ScalarType dtype, const char* what) {
  switch (dtype) {
    case ScalarType::Float:
      return Type::kFloat32;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    case ScalarType::Half:
      return Type::kFloat16;
    default:
      refuse(what, " must be float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype));
  }
}

inline void check_words(const Tensor& t, const char* what) {
  BOP2ND_REQUIRE(t.scalar_type() == ScalarType::Int, what, " must be int32 words, got ",
                 torch::headeronly::toString(t.scalar_type()));
}

inline Tensor compact(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Not by torch::stable::empty or new_empty: they go through the dispatcher, which takes longer than a small
// product.
inline Tensor new_strided(const Tensor& like, const Ints& sizes, const Ints& strides, ScalarType dtype) {
  int32_t device_type, type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), type, device_type, like.get_device_index(),
                                                  &made));
  return Tensor(made);
}

inline int64_t times(int64_t a, int64_t b) {
  int64_t product;
  BOP2ND_REQUIRE(!__builtin_mul_overflow(a, b, &product), "sizes whose product is beyond 2**63: ", a, " and ",
                 b);
  return product;
}

inline int64_t product(const Ints& sizes, size_t begin, size_t end) {
  int64_t n = 1;
  for (size_t i = begin; i < end; ++i) n = times(n, sizes[i]);
  return n;
}

// The last axis is the nearest.
inline Tensor new_tensor(const Tensor& like, const Ints& sizes, ScalarType dtype) {
  Ints strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = times(strides[i], std::max<int64_t>(1, sizes[i]));
  return new_strided(like, sizes, strides, dtype);
}

// [N, C, H, W] with C nearest.
inline Tensor new_channels_last(const Tensor& like, const Ints& sizes, ScalarType dtype) {
  int64_t line = sizes[3] * sizes[1];
  return new_strided(like, sizes, {sizes[2] * line, 1, line, sizes[1]}, dtype);
}

// Whether an image's channels are nearest: Tensor::suggest_memory_format of torch, which the stable ABI
// lacks.
inline bool is_channels_last(const Tensor& t) {
  if (t.stride(1) == 0) return false;
  int64_t least = 0;
  for (int64_t axis : {1, 3, 2, 0}) {
    int64_t size = t.size(axis), stride = t.stride(axis);
    if (size == 0 || stride < least || (axis == 0 && least == t.stride(1))) return false;
    least = stride * size;
  }
  return true;
}

inline uint32_t* words_of(const Tensor& t) { return static_cast<uint32_t*>(t.mutable_data_ptr()); }
inline const uint32_t* const_words_of(const Tensor& t) {
  return static_cast<const uint32_t*>(t.const_data_ptr());
}

inline Ints sizes_of(const Tensor& t) {
  auto sizes = t.sizes();
  return Ints(sizes.begin(), sizes.end());
}

inline std::string text_of(const Ints& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// An operand of the epilogue, or null. `keep` holds its memory.
inline const void* operand(const MaybeTensor& given, MaybeTensor& keep, const Ints& sizes, ScalarType dtype,
                           const char* what) {
  if (!given) return nullptr;
  Ints found = sizes_of(*given);
  BOP2ND_REQUIRE(found == sizes && given->scalar_type() == dtype, what, " must be ", text_of(sizes), " of ",
                 torch::headeronly::toString(dtype), ", got ", text_of(found), " of ",
                 torch::headeronly::toString(given->scalar_type()));
  keep = compact(*given);
  return keep->const_data_ptr();
}

// A tensor lies where the first operand of the operator lies.
inline void check_beside(const Tensor& first, const Tensor& other, const char* what) {
  int32_t kinds[2];
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(first.get(), &kinds[0]));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(other.get(), &kinds[1]));
  BOP2ND_REQUIRE(kinds[0] == kinds[1] && first.get_device_index() == other.get_device_index(), what,
                 " must be on the same device as the other operands");
}

inline int64_t normal_dim(int64_t dim, int64_t n_dims) {
  BOP2ND_REQUIRE(dim >= -n_dims && dim < n_dims, "dim ", dim, " does not exist in a tensor of ", n_dims,
                 " axes");
  return dim < 0 ? dim + n_dims : dim;
}

inline Tensor move_axis(const Tensor& t, int64_t from, int64_t to) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(t), torch::stable::detail::from(from),
                                    torch::stable::detail::from(to)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::movedim", "int", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Sizes must be `sizes` exactly.
inline void check_sizes(const Tensor& t, const Ints& sizes, const char* what) {
  Ints found = sizes_of(t);
  BOP2ND_REQUIRE(found == sizes, what, " must be ", text_of(sizes), ", got ", text_of(found));
}

// A tensor of no elements may have other sizes of any magnitude, also negative ones (torch 2.13's expand
// makes such): what follows from them is bounded.
inline void check_extent(const Tensor& t, const char* what) {
  int64_t extent = 1;
  for (int64_t size : t.sizes()) {
    BOP2ND_REQUIRE(size >= 0, what, " has a negative size: ", text_of(sizes_of(t)));
    bool fits = !__builtin_mul_overflow(extent, std::max<int64_t>(1, size), &extent) && extent < kMaxExtent;
    BOP2ND_REQUIRE(fits, what, " ", text_of(sizes_of(t)),
                   " is beyond 2**54 elements, where a size of 0 counts as 1");
  }
}

struct Axes {  // some neighbouring axes seen as one
  int64_t size = 1, stride = 1;
  bool uniform = true;

  void absorb(int64_t axis_size, int64_t axis_stride) {  // the next axis inwards
    if (axis_size == 1) return;
    if (size > 1 && stride != axis_size * axis_stride) uniform = false;
    size *= axis_size;
    stride = axis_stride;
  }
  // Axes `begin` up to `end` of a tensor.
  static Axes of(const Tensor& t, int64_t begin, int64_t end) {
    Axes axes;
    for (int64_t i = begin; i < end; ++i) axes.absorb(t.size(i), t.stride(i));
    return axes;
  }
};

}  // namespace bop2nd::binding
