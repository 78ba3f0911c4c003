// SPDX-License-Identifier: Apache-2.0
// Packing, unpacking and masks on CUDA: see register_cuda.h.
#include "register_cuda.h"

namespace bop2nd::cuda {
namespace {

// x seen as [outer, inner, groups, length]; false if its axes cannot be merged as they lie in memory.
bool describe(const Tensor& x, int64_t dim, int64_t groups, PackProblem* p) {
  Axes outer = Axes::of(x, 0, dim), inner = Axes::of(x, dim + 1, x.dim());
  int64_t length = x.size(dim) / groups;
  *p = PackProblem::of(outer.size, inner.size, groups, length);
  p->length_stride = length == 1 ? 1 : x.stride(dim);
  p->group_stride = length * x.stride(dim);
  p->outer_stride = outer.size == 1 ? inner.size * groups * length : outer.stride;
  p->inner_stride = inner.size == 1 ? groups * length : inner.stride;
  return outer.uniform && inner.uniform;
}

}  // namespace

std::tuple<Tensor, Tensor> pack_tensor(const Tensor& input, int64_t dim, int64_t groups, bool with_mask) {
  Place place(input);
  dim = normal_dim(dim, input.dim());
  BOP2ND_REQUIRE(groups > 0 && input.size(dim) % groups == 0, "groups must divide the packed axis");
  Dtype type = real_type<Dtype>(input.scalar_type(), "the tensor to pack");
  Ints sizes = sizes_of(input);
  int64_t row_words = words_for(input.size(dim) / groups);
  sizes.erase(sizes.begin() + dim);
  sizes.push_back(groups * row_words);
  Tensor signs = new_tensor(input, sizes, ScalarType::Int);
  Tensor mask = new_tensor(input, with_mask ? sizes : Ints{0}, ScalarType::Int);
  if (signs.numel() == 0) return {signs, mask};
  BOP2ND_REQUIRE(signs.numel() <= kMax32 && input.size(dim) <= kMax32, "more than 2^31 - 1 words");
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

namespace {

Tensor pack_bits(const Tensor input, int64_t dim) { return std::get<0>(pack_tensor(input, dim, 1, false)); }

std::tuple<Tensor, Tensor> pack_bits_ste(const Tensor input, int64_t dim, int64_t groups) {
  return pack_tensor(input, dim, groups, true);
}

Tensor unpack_bits(const Tensor words, int64_t length, int64_t dim, ScalarType dtype) {
  Place place(words);
  check_words(words, "words");
  BOP2ND_REQUIRE(words.dim() > 0 && length >= 0 && words.size(words.dim() - 1) == words_for(length),
                 "length ", length, " does not fit the words");
  Tensor w = compact(words);
  bool direct = dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  Ints sizes = sizes_of(w);
  sizes.back() = length;
  Tensor out = new_tensor(w, sizes, direct ? dtype : ScalarType::Float);
  UnpackProblem p;
  p.words = const_words_of(w);
  p.elements = out.mutable_data_ptr();
  p.type = real_type<Dtype>(out.scalar_type(), "dtype");
  p.n_rows = product(sizes, 0, sizes.size() - 1);
  p.length = length;
  BOP2ND_REQUIRE(p.n_blocks() <= kMax32, "too many elements to unpack at once");
  if (out.numel() > 0) check(launch_unpack(p, place.stream), "unpack_bits");
  if (!direct) out = torch::stable::to(out, dtype);
  return normal_dim(dim, out.dim()) == out.dim() - 1 ? out : move_axis(out, -1, dim);
}

void apply_mask_(const Tensor grad, const Tensor mask) {
  Place place(grad);
  check_words(mask, "mask");
  check_beside(grad, mask, "mask");
  BOP2ND_REQUIRE(grad.dim() > 0 && mask.dim() == grad.dim() && grad.is_contiguous(),
                 "grad must be contiguous in walk order and have as many axes as mask");
  Ints sizes = sizes_of(grad);
  UnpackProblem p;
  p.type = real_type<Dtype>(grad.scalar_type(), "grad");
  p.n_rows = product(sizes, 0, sizes.size() - 1);
  p.length = sizes.back();
  BOP2ND_REQUIRE(mask.numel() == p.n_rows * words_for(p.length), "mask words do not fit the gradient");
  if (grad.numel() == 0) return;
  Tensor words = compact(mask);
  p.words = const_words_of(words);
  p.elements = grad.mutable_data_ptr();
  BOP2ND_REQUIRE(p.n_blocks() <= kMax32, "too many elements to mask at once");
  check(launch_mask(p, place.stream), "apply_mask_");
}

}  // namespace
}  // namespace bop2nd::cuda

STABLE_TORCH_LIBRARY_IMPL(BOP2ND_NAMESPACE, BOP2ND_DEVICE, m) {
  using namespace bop2nd::cuda;
  m.impl("pack_bits", TORCH_BOX(&pack_bits));
  m.impl("pack_bits_ste", TORCH_BOX(&pack_bits_ste));
  m.impl("unpack_bits", TORCH_BOX(&unpack_bits));
  m.impl("apply_mask_", TORCH_BOX(&apply_mask_));
}
