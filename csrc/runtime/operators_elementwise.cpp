// SPDX-License-Identifier: Apache-2.0
// Elementwise operators: every operation rounded by itself (except with alpha other than 1 nothing is fused).
#include <cmath>
#include <limits>

#include "../cpu/dispatch.h"
#include "operators.h"
#include "plan.h"

namespace bop2nd::runtime {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
using Offsets = std::array<int64_t, Walk::kOperands>;

// Images stay as their operands lie.
bool wants_channels_last(const Sizes& shape, const Tensor& a, const Tensor* b) {
  auto lies = [&](const Tensor& t) { return t.shape == shape && t.channels_last() && !t.row_major(); };
  return shape.size() == 4 && (lies(a) || (b && lies(*b)));
}

// Runs of a result from up to two operands: element steps other than 0 and 1 are gathered first.
template <class Run>
void over_runs(const Walk& walk, const float* a, const float* b, float* to, const Run& run) {
  constexpr int64_t kPart = 256;
  int64_t steps[2] = {walk.inner_strides[1], walk.inner_strides[2]};
  bool plain = steps[0] >= 0 && steps[0] <= 1 && steps[1] >= 0 && steps[1] <= 1;
  walk.run([&](const Offsets& at) {
    const float* from[2] = {a + at[1], b ? b + at[2] : nullptr};
    if (plain) return run(walk.inner, from[0], steps[0], from[1], steps[1], to + at[0]);
    float gathered[2][kPart];
    for (int64_t first = 0; first < walk.inner; first += kPart) {
      int64_t n = walk.inner - first < kPart ? walk.inner - first : kPart;
      for (int k = 0; k < 2; ++k) {
        for (int64_t i = 0; from[k] && i < n; ++i) gathered[k][i] = from[k][(first + i) * steps[k]];
      }
      run(n, gathered[0], 1, b ? gathered[1] : nullptr, 1, to + at[0] + first);
    }
  });
}

Value binary(Planner& p, RealOperation operation, const Tensor& a, const Tensor& b, float alpha) {
  Sizes shape = broadcast(p, a.shape, b.shape);
  Tensor to = p.make(Type::kF32, shape, wants_channels_last(shape, a, &b));
  Walk walk(to, {&a, &b, nullptr});
  p.emit({a, b}, {to}, 0, [=](const Memory& memory) {
    const RealTable& table = real_table();
    over_runs(walk, memory.at(a), memory.at(b), memory.at(to),
              [&](int64_t n, const float* x, int64_t x_step, const float* y, int64_t y_step, float* out) {
                table.binary(operation, n, x, x_step, y, y_step, alpha, out);
              });
  });
  return Value::of(to);
}

Value with_number(Planner& p, RealOperation operation, const Tensor& a, float b, float alpha) {
  Tensor to = p.make(Type::kF32, a.shape, wants_channels_last(a.shape, a, nullptr));
  Walk walk(to, {&a, nullptr, nullptr});
  p.emit({a}, {to}, 0, [=](const Memory& memory) {
    const RealTable& table = real_table();
    over_runs(walk, memory.at(a), nullptr, memory.at(to),
              [&](int64_t n, const float* x, int64_t step, const float*, int64_t, float* out) {
                table.binary(operation, n, x, step, &b, 0, alpha, out);
              });
  });
  return Value::of(to);
}

template <RealOperation operation, bool has_alpha>
Value arithmetic(Planner& p, const Step& s) {
  Tensor a = p.real(s.arguments[0]);
  float alpha = has_alpha ? static_cast<float>(p.number(s.arguments[2])) : 1.0f;
  if (p.is_number(s.arguments[1]))
    return with_number(p, operation, a, static_cast<float>(p.number(s.arguments[1])), alpha);
  return binary(p, operation, a, p.real(s.arguments[1]), alpha);
}

Value negative(Planner& p, const Step& s) {
  return with_number(p, RealOperation::kMul, p.real(s.arguments[0]), -1.0f, 1.0f);
}

Value clamped(Planner& p, const Tensor& a, float low, float high) {
  Tensor to = p.make(Type::kF32, a.shape, wants_channels_last(a.shape, a, nullptr));
  Walk walk(to, {&a, nullptr, nullptr});
  p.emit({a}, {to}, 0, [=](const Memory& memory) {
    const RealTable& table = real_table();
    over_runs(walk, memory.at(a), nullptr, memory.at(to),
              [&](int64_t n, const float* x, int64_t step, const float*, int64_t, float* out) {
                table.clamp(n, x, step, low, high, out);
              });
  });
  return Value::of(to);
}

Value relu(Planner& p, const Step& s) { return clamped(p, p.real(s.arguments[0]), 0.0f, kInfinity); }

Value clamp(Planner& p, const Step& s) {
  auto bound = [&](size_t i, float none) {
    bool given = p.value(s.arguments[i]).kind != Value::Kind::kNull;
    return given ? static_cast<float>(p.number(s.arguments[i])) : none;
  };
  return clamped(p, p.real(s.arguments[0]), bound(1, -kInfinity), bound(2, kInfinity));
}

Value leaky_relu(Planner& p, const Step& s) {
  return with_number(p, RealOperation::kPrelu, p.real(s.arguments[0]),
                     static_cast<float>(p.number(s.arguments[1])), 1.0f);
}

// [C] as [C, 1, 1]: along axis 1 of `like`.
Tensor along_channels(const Planner& p, Tensor row, const Tensor& like) {
  int64_t channels = like.rank() > 1 ? like.shape[1] : 1;
  p.check(row.rank() == 1 && row.shape[0] == channels, "a row does not have an element for every channel");
  for (size_t i = 2; i < like.rank(); ++i) row.shape.push_back(1), row.strides.push_back(0);
  return row;
}

Value prelu(Planner& p, const Step& s) {
  Tensor a = p.real(s.arguments[0]), weight = p.real(s.arguments[1]);
  p.check(weight.rank() == 1, "the weight is no row");
  if (weight.shape[0] != 1) weight = along_channels(p, weight, a);
  return binary(p, RealOperation::kPrelu, a, weight, 1.0f);
}

// Scale and shift, made now if all rows lie in a file.
std::array<Tensor, 2> affine_tensors(Planner& p, const std::array<Tensor, 4>& rows,
                                     const std::array<bool, 4>& given, double eps, int64_t n) {
  NormRounding norms = p.norms();
  bool fixed = norms == NormRounding::kOwn;
  std::vector<Tensor> reads;
  for (size_t i = 0; i < 4; ++i) {
    if (given[i]) reads.push_back(rows[i]);
    fixed = fixed && (!given[i] || rows[i].is_fixed());
  }
  auto rows_at = [=](const Memory& memory) {
    std::array<NormRow, 4> found{};
    for (size_t i = 0; i < 4; ++i) {
      if (given[i]) found[i] = {memory.at(rows[i]), rows[i].strides[0]};
    }
    return found;
  };
  if (fixed) {
    std::vector<float> numbers(static_cast<size_t>(2 * n));
    affine_of_norm(norms, rows_at(Memory{nullptr, nullptr}), eps, n, numbers.data(), numbers.data() + n);
    const float* kept = p.keep(std::move(numbers));
    return {fixed_tensor({.shape = {n}, .data = kept}), fixed_tensor({.shape = {n}, .data = kept + n})};
  }
  Tensor scale = p.make(Type::kF32, {n}), shift = p.make(Type::kF32, {n});
  p.emit(reads, {scale, shift}, 0, [=](const Memory& memory) {
    affine_of_norm(norms, rows_at(memory), eps, n, memory.at(scale), memory.at(shift));
  });
  return {scale, shift};
}

Value batch_norm(Planner& p, const Step& s) {
  Tensor x = p.real(s.arguments[0]);
  p.check(x.rank() >= 2 && !p.truth(s.arguments[5]), "it takes [N, C, ...] and does not train");
  int64_t n = x.shape[1];
  double eps = p.number(s.arguments[7]);
  std::array<Tensor, 4> rows;  // weight, bias, mean, variance; the first two may be missing
  std::array<bool, 4> given;
  for (size_t i = 0; i < 4; ++i) {
    given[i] = p.value(s.arguments[i + 1]).kind != Value::Kind::kNull;
    p.check(given[i] || i < 2, "statistics are missing");
    if (!given[i]) continue;
    rows[i] = p.real(s.arguments[i + 1]);
    p.check(rows[i].rank() == 1 && rows[i].shape[0] == n, "a row does not have an element for every channel");
  }
  auto [scale, shift] = affine_tensors(p, rows, given, eps, n);
  Tensor to = p.make(Type::kF32, x.shape, wants_channels_last(x.shape, x, nullptr));
  Tensor a = along_channels(p, scale, x), b = along_channels(p, shift, x);
  Walk walk(to, {&x, &a, &b});
  bool fused = p.norms() == NormRounding::kTorchFused;
  p.emit({x, a, b}, {to}, 0, [=](const Memory& memory) {
    auto affine = fused ? real_table().fused_affine : real_table().affine;
    const float *from = memory.at(x), *factors = memory.at(a), *terms = memory.at(b);
    float* out = memory.at(to);
    walk.run([&](const Offsets& at) {
      affine(walk.inner, from + at[1], walk.inner_strides[1], factors + at[2], terms + at[3],
             walk.inner_strides[2], out + at[0]);
    });
  });
  return Value::of(to);
}

}  // namespace

void affine_of_norm(NormRounding rounding, const std::array<NormRow, 4>& rows, double eps, int64_t n,
                    float* scale, float* shift) {
  auto number = [&](size_t row, int64_t i) {
    return rows[row].at ? rows[row].at[i * rows[row].stride] : row == 0 ? 1.0f : 0.0f;
  };
  for (int64_t i = 0; i < n && rounding != NormRounding::kOwn; ++i) {
    float mean = number(2, i),
          factor = 1.0f / std::sqrt(number(3, i) + static_cast<float>(eps)) * number(0, i);
    bool fused = rounding == NormRounding::kTorchFused;
    scale[i] = factor;
    shift[i] = fused ? std::fma(-mean, factor, number(1, i)) : number(1, i) - mean * factor;
  }
  for (int64_t i = 0; i < n && rounding == NormRounding::kOwn; ++i) {
    double factor = static_cast<double>(number(0, i)) / std::sqrt(static_cast<double>(number(3, i)) + eps);
    scale[i] = static_cast<float>(factor);
    shift[i] = static_cast<float>(number(1, i) - number(2, i) * factor);
  }
}

const std::vector<Operator>& elementwise_operators() {
  static const std::vector<Operator> all = {
      {.name = "aten.add.Tensor",
       .arguments = {"self", "other", "alpha"},
       .plan = arithmetic<RealOperation::kAdd, true>},
      {.name = "aten.sub.Tensor",
       .arguments = {"self", "other", "alpha"},
       .plan = arithmetic<RealOperation::kSub, true>},
      {.name = "aten.mul.Tensor",
       .arguments = {"self", "other"},
       .plan = arithmetic<RealOperation::kMul, false>},
      {.name = "aten.div.Tensor",
       .arguments = {"self", "other"},
       .plan = arithmetic<RealOperation::kDiv, false>},
      {.name = "aten.neg.default", .arguments = {"self"}, .plan = negative},
      {.name = "aten.relu.default", .arguments = {"self"}, .plan = relu},
      {.name = "aten.leaky_relu.default", .arguments = {"self", "negative_slope"}, .plan = leaky_relu},
      {.name = "aten.prelu.default", .arguments = {"self", "weight"}, .plan = prelu},
      {.name = "aten.hardtanh.default", .arguments = {"self", "min_val", "max_val"}, .plan = clamp},
      {.name = "aten.clamp.default", .arguments = {"self", "min", "max"}, .plan = clamp},
      {.name = kBatchNorm,
       .arguments = {"input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps",
                     "cudnn_enabled"},
       .plan = batch_norm},
  };
  return all;
}

}  // namespace bop2nd::runtime
