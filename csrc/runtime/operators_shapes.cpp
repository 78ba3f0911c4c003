// SPDX-License-Identifier: Apache-2.0
// Operators that lay out, repeat, join or sum along axes.
#include <algorithm>
#include <cmath>

#include "../cpu/dispatch.h"
#include "../cpu/parallel.h"
#include "operators.h"
#include "windows.h"

namespace bop2nd::runtime {
namespace {

size_t axis_of(const Planner& p, int64_t axis, size_t rank) {
  int64_t n = static_cast<int64_t>(rank);
  p.check(axis >= -n && axis < n, "there is no such axis");
  return static_cast<size_t>(axis < 0 ? axis + n : axis);
}

Value viewed(Planner& p, const Tensor& from, Sizes shape) {
  int64_t known = 1;
  int free = -1;
  p.check(shape.size() <= kMaxAxes, "more than 16 axes");
  for (size_t i = 0; i < shape.size(); ++i) {
    p.check(shape[i] >= -1 && (shape[i] != -1 || free < 0), "a size is negative, or two are left open");
    if (shape[i] == -1) free = static_cast<int>(i);
    p.check(shape[i] == -1 || !__builtin_mul_overflow(known, shape[i], &known), "the shape is too large");
  }
  int64_t n = from.count();
  if (free >= 0) {
    p.check(known > 0 && n % known == 0, "the shape does not hold as many elements");
    shape[static_cast<size_t>(free)] = n / known, known = n;
  }
  p.check(known == n, "the shape does not hold as many elements");
  p.check(extent(shape) > 0, "the shape is too large");
  Tensor to = p.dense(from);
  to.strides = row_major_strides(shape);
  to.shape = std::move(shape);
  return Value::of(to);
}

Value view(Planner& p, const Step& s) {
  return viewed(p, p.tensor(s.arguments[0]), p.integers(s.arguments[1]));
}

Value flatten(Planner& p, const Step& s) {
  Tensor x = p.tensor(s.arguments[0]);
  if (x.rank() == 0) return viewed(p, x, {1});
  size_t first = axis_of(p, p.integer(s.arguments[1]), x.rank());
  size_t last = axis_of(p, p.integer(s.arguments[2]), x.rank());
  p.check(first <= last, "the axes are in the wrong order");
  Sizes shape(x.shape.begin(), x.shape.begin() + static_cast<std::ptrdiff_t>(first));
  int64_t n = 1;
  for (size_t i = first; i <= last; ++i) n *= x.shape[i];
  shape.push_back(n);
  shape.insert(shape.end(), x.shape.begin() + static_cast<std::ptrdiff_t>(last) + 1, x.shape.end());
  return viewed(p, x, std::move(shape));
}

Value permute(Planner& p, const Step& s) {
  Tensor x = p.tensor(s.arguments[0]), to = x;
  Sizes dims = p.integers(s.arguments[1]);
  p.check(dims.size() == x.rank(), "not every axis is named");
  std::vector<bool> seen(x.rank());
  for (size_t i = 0; i < dims.size(); ++i) {
    size_t axis = axis_of(p, dims[i], x.rank());
    p.check(!seen[axis], "an axis is named twice");
    seen[axis] = true;
    to.shape[i] = x.shape[axis], to.strides[i] = x.strides[axis];
  }
  return Value::of(to);
}

Value expanded(Planner& p, Tensor x, const Sizes& sizes) {
  p.check(sizes.size() >= x.rank() && sizes.size() <= kMaxAxes,
          "it has fewer axes than the tensor, or more than 16");
  size_t added = sizes.size() - x.rank();
  Tensor to = x;
  to.shape.resize(sizes.size()), to.strides.resize(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    int64_t own = i < added ? 1 : x.shape[i - added], size = i >= added && sizes[i] == -1 ? own : sizes[i];
    p.check(size >= 0 && (own == size || own == 1), "a size is neither the tensor's nor repeats it");
    to.shape[i] = size, to.strides[i] = i < added || own != size ? 0 : x.strides[i - added];
  }
  p.check(extent(to.shape) > 0, "the shape is too large");
  return Value::of(to);
}

Value expand(Planner& p, const Step& s) {
  return expanded(p, p.tensor(s.arguments[0]), p.integers(s.arguments[1]));
}

Value expand_as(Planner& p, const Step& s) {
  return expanded(p, p.tensor(s.arguments[0]), p.tensor(s.arguments[1]).shape);
}

Value contiguous(Planner& p, const Step& s) { return Value::of(p.tensor(s.arguments[0])); }

Value sym_size(Planner& p, const Step& s) {
  Tensor x = p.tensor(s.arguments[0]);
  return Value::of(x.shape[axis_of(p, p.integer(s.arguments[1]), x.rank())]);
}

Value cat(Planner& p, const Step& s) {
  Value list = p.value(s.arguments[0]);
  p.check(list.kind == Value::Kind::kList && !list.items.empty(), "it takes a list of tensors");
  std::vector<Tensor> parts;
  for (const Value& item : list.items) {
    p.check(item.kind == Value::Kind::kTensor, "it takes a list of tensors");
    p.check(parts.empty() || item.tensor.type == parts[0].type, "the tensors have different dtypes");
    parts.push_back(item.tensor);
  }
  size_t axis = axis_of(p, p.integer(s.arguments[1]), parts[0].rank());
  Sizes shape = parts[0].shape;
  shape[axis] = 0;
  bool images = true;
  for (const Tensor& part : parts) {
    p.check(part.rank() == shape.size(), "the tensors have different numbers of axes");
    for (size_t i = 0; i < shape.size(); ++i)
      p.check(i == axis || part.shape[i] == shape[i], "the tensors differ along another axis");
    shape[axis] += part.shape[axis];
    images = images && part.channels_last();
  }
  Tensor to = p.make(parts[0].type, shape, images);
  std::vector<Tensor> targets;
  std::vector<Walk> walks;
  for (const Tensor& part : parts) {
    Tensor target = to;
    target.shape = part.shape;
    walks.emplace_back(target, std::array<const Tensor*, 3>{&part, nullptr, nullptr});
    targets.push_back(target);
    to.offset += part.shape[axis] * to.strides[axis];
  }
  to.offset = 0;
  p.emit(parts, {to}, 0, [=](const Memory& memory) {
    for (size_t i = 0; i < parts.size(); ++i) copy_elements(memory, walks[i], parts[i], targets[i]);
  });
  return Value::of(to);
}

// ------------------------------------------------------------------------------------------ along axes

// All positions of some axes: offsets of their elements.
std::vector<int64_t> offsets_of(const Planner& p, const Tensor& x, const std::vector<bool>& reduced) {
  int64_t n = 1;
  for (size_t i = 0; i < x.rank(); ++i) n *= reduced[i] ? x.shape[i] : 1;
  p.check(n <= kMaxSummands, "more than 2^24 elements make one result");
  std::vector<int64_t> offsets{0};
  for (size_t axis = 0; axis < x.rank(); ++axis) {
    if (!reduced[axis]) continue;
    std::vector<int64_t> next;
    next.reserve(offsets.size() * static_cast<size_t>(x.shape[axis]));
    for (int64_t offset : offsets) {
      for (int64_t i = 0; i < x.shape[axis]; ++i) next.push_back(offset + i * x.strides[axis]);
    }
    offsets = std::move(next);
  }
  return offsets;
}

Value mean(Planner& p, const Step& s) {
  Tensor x = p.real(s.arguments[0]);
  p.check(p.value(s.arguments[3]).kind == Value::Kind::kNull, "a dtype is given");
  std::vector<bool> reduced(x.rank());
  bool all = p.value(s.arguments[1]).kind == Value::Kind::kNull;
  Sizes dims = all ? Sizes{} : p.integers(s.arguments[1]);
  for (int64_t dim : dims) reduced[axis_of(p, dim, x.rank())] = true;
  if (dims.empty()) reduced.assign(x.rank(), true);
  bool keep = p.truth(s.arguments[2]);
  Tensor kept = x;  // with the reduced axes of size 1
  Sizes shape;
  for (size_t i = 0; i < x.rank(); ++i) {
    if (reduced[i]) kept.shape[i] = 1;
    if (!reduced[i] || keep) shape.push_back(kept.shape[i]);
  }
  std::vector<int64_t> offsets = offsets_of(p, x, reduced);
  Tensor to = p.make(Type::kF32, kept.shape);
  Walk walk(to, {&kept, nullptr, nullptr});
  double n = static_cast<double>(offsets.size());
  p.emit({x}, {to}, n * static_cast<double>(to.count()), [=](const Memory& memory) {
    const RealTable& table = real_table();
    const float* from = memory.at(x);
    float* out = memory.at(to);
    float divisor = static_cast<float>(n);
    walk.run([&](const std::array<int64_t, Walk::kOperands>& at) {
      const float* first = from + at[1];
      float* sums = out + at[0];
      if (walk.inner_strides[1] == 1) {  // channels lie side by side
        table.window_sum(unweighted(first, offsets, walk.inner, sums));
      } else {
        for (int64_t i = 0; i < walk.inner; ++i) {
          double sum = 0;
          for (int64_t offset : offsets) sum += first[i * walk.inner_strides[1] + offset];
          sums[i] = static_cast<float>(sum);
        }
      }
      table.binary(RealOperation::kDiv, walk.inner, sums, 1, &divisor, 0, 1.0f, sums);
    });
  });
  return viewed(p, to, shape);
}

template <bool logarithm>
Value softmax(Planner& p, const Step& s) {
  Tensor x = p.real(s.arguments[0]);
  p.check(p.value(s.arguments[2]).kind == Value::Kind::kNull, "a dtype is given");
  p.check(x.rank() > 0, "it has no axes");
  size_t axis = axis_of(p, p.integer(s.arguments[1]), x.rank());
  Tensor to = p.make(Type::kF32, x.shape), first = to, from = x;
  int64_t n = x.shape[axis], step = x.strides[axis], to_step = to.strides[axis];
  first.shape[axis] = from.shape[axis] = 1;
  Walk walk(first, {&from, nullptr, nullptr});
  p.emit({x}, {to}, 0, [=](const Memory& memory) {
    walk.run([&](const std::array<int64_t, Walk::kOperands>& at) {
      for (int64_t i = 0; i < walk.inner; ++i) {
        const float* a = memory.at(x) + at[1] + i * walk.inner_strides[1];
        float *b = memory.at(to) + at[0] + i * walk.inner_strides[0], most = -INFINITY, sum = 0;
        for (int64_t k = 0; k < n; ++k) most = std::max(most, a[k * step]);
        for (int64_t k = 0; k < n; ++k) sum += b[k * to_step] = std::exp(a[k * step] - most);
        float log_sum = std::log(sum);
        for (int64_t k = 0; k < n; ++k)
          b[k * to_step] = logarithm ? a[k * step] - most - log_sum : b[k * to_step] / sum;
      }
    });
  });
  return Value::of(to);
}

}  // namespace

const std::vector<Operator>& shape_operators() {
  static const std::vector<Operator> all = {
      {.name = "aten.view.default", .arguments = {"self", "size"}, .plan = view},
      {.name = "aten.reshape.default", .arguments = {"self", "shape"}, .plan = view},
      {.name = "aten.flatten.using_ints", .arguments = {"self", "start_dim", "end_dim"}, .plan = flatten},
      {.name = "aten.permute.default", .arguments = {"self", "dims"}, .plan = permute},
      {.name = "aten.expand.default", .arguments = {"self", "size", "implicit"}, .plan = expand},
      {.name = "aten.expand_as.default", .arguments = {"self", "other"}, .plan = expand_as},
      {.name = "aten.contiguous.default", .arguments = {"self", "memory_format"}, .plan = contiguous},
      {.name = "aten.sym_size.int", .arguments = {"self", "dim"}, .plan = sym_size},
      {.name = "aten.cat.default", .arguments = {"tensors", "dim"}, .plan = cat},
      {.name = "aten.mean.dim", .arguments = {"self", "dim", "keepdim", "dtype"}, .plan = mean},
      {.name = "aten.softmax.int", .arguments = {"self", "dim", "dtype"}, .plan = softmax<false>},
      {.name = "aten.log_softmax.int", .arguments = {"self", "dim", "dtype"}, .plan = softmax<true>},
  };
  return all;
}

}  // namespace bop2nd::runtime
