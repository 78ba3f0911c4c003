// SPDX-License-Identifier: Apache-2.0
// Walks over results and operands of any strides.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "plan.h"

namespace bop2nd::runtime {

Walk::Walk(const Tensor& to, std::array<const Tensor*, kOperands - 1> from) {
  size_t n = to.rank();
  std::vector<size_t> axes(n);
  std::iota(axes.begin(), axes.end(), 0);
  std::sort(axes.begin(), axes.end(), [&](size_t a, size_t b) {
    return to.strides[a] != to.strides[b] ? to.strides[a] > to.strides[b] : a < b;
  });
  for (size_t axis : axes) {
    int64_t size = to.shape[axis];
    if (size == 1) continue;
    std::array<int64_t, kOperands> steps{to.strides[axis]};
    for (size_t i = 0; i + 1 < kOperands; ++i) {
      const Tensor* operand = from[i];
      if (!operand || axis + operand->rank() < n) continue;
      size_t own = axis + operand->rank() - n;
      steps[i + 1] = operand->shape[own] == 1 ? 0 : operand->strides[own];
    }
    bool merges = !sizes.empty();
    for (size_t i = 0; merges && i < kOperands; ++i) merges = strides.back()[i] == steps[i] * size;
    if (merges) {
      sizes.back() *= size, strides.back() = steps;
    } else {
      sizes.push_back(size), strides.push_back(steps);
    }
  }
  if (!sizes.empty()) {
    inner = sizes.back(), inner_strides = strides.back();
    sizes.pop_back(), strides.pop_back();
  }
  for (int64_t size : sizes) outer *= size;
  if (to.count() == 0) outer = 0;
}

namespace {

template <class T>
void copy_as(const Memory& memory, const Walk& walk, const Tensor& from, const Tensor& to) {
  const T* source = memory.at<T>(from);
  T* target = memory.at<T>(to);
  int64_t n = walk.inner, step = walk.inner_strides[1], to_step = walk.inner_strides[0];
  walk.run([&](const std::array<int64_t, Walk::kOperands>& at) {
    const T* a = source + at[1];
    T* b = target + at[0];
    if (step == 1 && to_step == 1) {
      std::copy(a, a + n, b);
    } else {
      for (int64_t i = 0; i < n; ++i) b[i * to_step] = a[i * step];
    }
  });
}

}  // namespace

void copy_elements(const Memory& memory, const Walk& walk, const Tensor& from, const Tensor& to) {
  // Float and word alike: four bytes.
  (bytes_of(from.type) == 1 ? copy_as<uint8_t> : copy_as<uint32_t>)(memory, walk, from, to);
}

Sizes broadcast(const Planner& planner, const Sizes& a, const Sizes& b) {
  Sizes shape = a.size() >= b.size() ? a : b;
  const Sizes& shorter = a.size() >= b.size() ? b : a;
  for (size_t i = 0; i < shorter.size(); ++i) {
    int64_t& size = shape[i + shape.size() - shorter.size()];
    planner.check(size == shorter[i] || size == 1 || shorter[i] == 1,
                  "the operands' shapes do not fit each other");
    if (size == 1) size = shorter[i];
  }
  return shape;
}

}  // namespace bop2nd::runtime
