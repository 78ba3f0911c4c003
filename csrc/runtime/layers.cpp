// SPDX-License-Identifier: Apache-2.0
// Layers of words: products on the loops of csrc/cpu, to the bit what torch gives.
#include <algorithm>

#include "../core/bit_layout.h"
#include "../core/conv_shape.h"
#include "../cpu/operators.h"
#include "../cpu/signed_product.h"
#include "windows.h"

namespace bop2nd::runtime {
namespace {

const uint32_t* weight_words(const Layer& layer) {
  return static_cast<const uint32_t*>(layer.tensor("weight")->data);
}

Kept blocked_weight(Planner& p, const Layer& layer) {
  const Stored& weight = *layer.tensor("weight");
  int64_t outputs = layer.weight_shape[0], row_words = weight.count() / outputs;
  return p.prepared().get(blocked_key(weight.data, layer.groups), [&] {
    int64_t n_blocks = (outputs / layer.groups + 15) / 16;
    Words made(static_cast<size_t>(layer.groups * n_blocks * 16 * row_words));
    prepack_weight(weight_words(layer), outputs, layer.groups, row_words, made.data());
    return made;
  });
}

// -1 times the padding bits for every output: they are no products.
Kept minus_padding(Planner& p, const Layer& layer) {
  size_t n = static_cast<size_t>(layer.weight_shape[0]);
  return p.prepared().get({layer.tensor("weight")->data, {2, layer.padding_bits}}, [&] {
    Words made(n);
    std::fill_n(reinterpret_cast<float*>(made.data()), n, -static_cast<float>(layer.padding_bits));
    return made;
  });
}

Epilogue epilogue_of(const Layer& layer, const float* padding) {
  Epilogue to;
  if (const Stored* threshold = layer.tensor("threshold"))
    to.threshold = static_cast<const int32_t*>(threshold->data);
  if (layer.emits == Layer::Emits::kPlain) {
    // Dots are whole numbers below 2^24: less the padding exact, then the bias.
    to.shift = padding ? padding : layer.floats("bias");
    to.post_shift = padding ? layer.floats("bias") : nullptr;
    return to;
  }
#define BOP2ND_FILL(name) to.name = layer.floats(#name);
  BOP2ND_PER_OUTPUT(BOP2ND_FILL)
#undef BOP2ND_FILL
  if (layer.has_low) to.low = layer.low;
  if (layer.has_high) to.high = layer.high;
  to.relu = layer.relu;
  return to;
}

bool has_second(Planner& p, const Step& step) {
  return step.arguments.size() > 1 && p.value(step.arguments[1]).kind != Value::Kind::kNull;
}

// What makes products with the weights as prepack_weight lays them, and the operands that it reads.
struct Multiply {
  std::vector<Tensor> reads;
  std::function<void(const Memory&, const uint32_t* blocked, const Epilogue&)> run;
};

Multiply multiply_words(const ConvShape& shape, const Tensor& x) {
  return {.reads = {x}, .run = [shape, x](const Memory& memory, const uint32_t* blocked, const Epilogue& to) {
            binary_conv(shape, memory.at<uint32_t>(x), blocked, to);
          }};
}

// What sums of integers take besides: for every set of taps that lie in the image, what a zero point adds.
void account_for_corrections(Planner& p, const ConvShape& shape) {
  int64_t sets = 1;
  for (int axis = 0; axis < 2; ++axis) {
    if (shape.padding[axis] > 0) sets *= shape.out_size(axis);
    p.make(Type::kI8, {shape.out_size(axis), shape.kernel[axis]});
  }
  p.make(Type::kI32, {sets, shape.out_channels + 32});
  p.make(Type::kI32, {shape.out_size(0), shape.out_size(1)});
}

// Strides of image, row, column and channel.
Multiply multiply_numbers(Planner& p, const Layer& layer, const Step& step, const ConvShape& shape,
                          const Tensor& x, std::array<int64_t, 4> strides) {
  SignedProduct product{};
  product.shape = shape;
  product.input = layer.input == Type::kF32  ? SignedInput::kReal
                  : layer.input == Type::kI8 ? SignedInput::kInt8
                                             : SignedInput::kUint8;
  product.image_stride = strides[0], product.row_stride = strides[1];
  product.column_stride = strides[2], product.channel_stride = strides[3];
  product.multiplier = layer.multiplier, product.zero_point = layer.zero_point;
  product.w = weight_words(layer);
  if (layer.input != Type::kF32) account_for_corrections(p, shape);
  Multiply made{.reads = {x}, .run = {}};
  bool scaled = has_second(p, step);
  Tensor scale;
  if (scaled) {
    scale = p.dense(p.real(step.arguments[1]));
    p.check(scale.count() == 1 || scale.count() == shape.batch,
            "input_scale is neither one number nor one for every image or row");
    product.scale_per_image = scale.count() > 1;
    made.reads.push_back(scale);
  }
  made.run = [=](const Memory& memory, const uint32_t* blocked, const Epilogue& to) {
    SignedProduct now = product;
    now.x = x.type == Type::kF32 ? static_cast<const void*>(memory.at(x)) : memory.at<uint8_t>(x);
    now.input_scale = scaled ? memory.at(scale) : nullptr;
    now.blocked = blocked, now.to = to;
    signed_product(now);
  };
  return made;
}

Value plan_product(Planner& p, const Layer& layer, const Step& step, const ConvShape& shape,
                   const Multiply& multiply, Sizes values_shape, Sizes signs_shape, bool image) {
  bool has_residual = layer.takes_words() && has_second(p, step);
  Tensor residual;
  if (has_residual) {
    p.check(layer.may_have_residual(), "it takes no residual");
    residual = p.real(step.arguments[1]);
    p.check(residual.shape == values_shape, "the residual does not have the values' shape");
    residual = image ? p.nearest_channels(residual) : p.dense(residual);
  }
  Kept blocked = blocked_weight(p, layer), padding;
  if (layer.padding_bits > 0 && layer.emits == Layer::Emits::kPlain && !layer.tensor("threshold"))
    padding = minus_padding(p, layer);
  Epilogue epilogue = epilogue_of(layer, padding ? reinterpret_cast<const float*>(padding.get()) : nullptr);
  Tensor values, signs;
  std::vector<Tensor> reads = multiply.reads, writes;
  if (has_residual) reads.push_back(residual);
  if (layer.gives_values()) writes.push_back(values = p.make(Type::kF32, values_shape, image));
  if (layer.gives_signs()) writes.push_back(signs = p.make(Type::kI32, signs_shape));
  bool gives_values = layer.gives_values(), gives_signs = layer.gives_signs();
  p.emit(reads, writes, static_cast<double>(shape.products()), [=, run = multiply.run](const Memory& memory) {
    Epilogue to = epilogue;
    (void)padding;  // kept for the epilogue
    if (gives_values) to.values = memory.at(values);
    if (gives_signs) to.signs = memory.at<uint32_t>(signs);
    if (has_residual) to.residual = memory.at(residual);
    run(memory, blocked.get(), to);
  });
  if (gives_values && gives_signs) {
    Value both;
    both.kind = Value::Kind::kList;
    both.items = {Value::of(values), Value::of(signs)};
    return both;
  }
  return Value::of(gives_values ? values : signs);
}

ConvShape conv_shape(const Layer& layer, int64_t batch, int64_t rows, int64_t columns) {
  const Sizes& w = layer.weight_shape;
  return checked({.batch = batch,
                  .height = rows,
                  .width = columns,
                  .channels = w[1] * layer.groups,
                  .groups = layer.groups,
                  .out_channels = w[0],
                  .kernel = {w[2], w[3]},
                  .stride = {layer.stride[0], layer.stride[1]},
                  .padding = {layer.padding[0], layer.padding[1]},
                  .dilation = {layer.dilation[0], layer.dilation[1]},
                  .padding_value = static_cast<int>(layer.padding_value)});
}

Value plan_conv(Planner& p, const Layer& layer, const Step& step) {
  bool words = layer.kind == LayerKind::kPackedConv2d;
  Tensor x = words ? p.dense(p.words(step.arguments[0])) : p.tensor(step.arguments[0], layer.input);
  const Sizes& w = layer.weight_shape;
  if (words) {
    p.check(x.rank() == 4 && x.shape[3] == layer.groups * words_for(w[1]),
            "it takes words [N, H, W, words] of its channels");
  } else {
    p.check(x.rank() == 4 && x.shape[1] == layer.groups * w[1], "it takes images [N, C, H, W]");
  }
  ConvShape shape = words ? conv_shape(layer, x.shape[0], x.shape[1], x.shape[2])
                          : conv_shape(layer, x.shape[0], x.shape[2], x.shape[3]);
  // What the loops themselves take: an image with its border, lists of taps for every kind of pixel.
  p.make(words ? Type::kI32 : layer.input,
         {x.shape[0], shape.height + 2 * layer.padding[0], shape.width + 2 * layer.padding[1],
          words ? x.shape[3] : x.shape[1]});
  int64_t rows = shape.out_size(0), columns = shape.out_size(1);
  std::array<int64_t, 4> strides{x.strides[0], x.strides[words ? 1 : 2], x.strides[words ? 2 : 3],
                                 x.strides[words ? 3 : 1]};
  Multiply multiply = words ? multiply_words(shape, x) : multiply_numbers(p, layer, step, shape, x, strides);
  return plan_product(p, layer, step, shape, multiply, {x.shape[0], w[0], rows, columns},
                      {x.shape[0], rows, columns, words_for(w[0])}, true);
}

Value plan_dense(Planner& p, const Layer& layer, const Step& step) {
  bool words = layer.kind == LayerKind::kPackedLinear;
  Tensor x = p.dense(p.tensor(step.arguments[0], words ? Type::kI32 : layer.input));
  const Sizes& w = layer.weight_shape;
  p.check(x.rank() >= 1 && x.shape.back() == (words ? words_for(w[1]) : w[1]),
          "a row does not fit its features");
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x.rank(); ++i) rows *= x.shape[i];
  ConvShape shape = checked({.batch = rows, .channels = w[1], .out_channels = w[0]});
  Multiply multiply =
      words ? multiply_words(shape, x) : multiply_numbers(p, layer, step, shape, x, {{w[1], w[1], w[1], 1}});
  Sizes values = x.shape, signs = x.shape;
  values.back() = w[0], signs.back() = words_for(w[0]);
  return plan_product(p, layer, step, shape, multiply, values, signs, false);
}

Value plan_quantize(Planner& p, const Layer& layer, const Step& step) {
  Tensor x = p.dense(p.real(step.arguments[0]));
  p.check(x.rank() >= 1, "it takes rows");
  int64_t length = x.shape.back();
  Sizes rows(x.shape.begin(), x.shape.end() - 1);
  int64_t n_rows = product(rows);
  Tensor q = p.make(Type::kI8, x.shape), scale = p.make(Type::kF32, layer.per_row ? rows : Sizes{1});
  const char* name = step.name.c_str();
  bool per_row = layer.per_row;
  p.emit({x}, {q, scale}, static_cast<double>(n_rows * length), [=](const Memory& memory) {
    int64_t wrong = quantize_rows(Dtype::kFloat32, memory.at(x), n_rows, length, per_row,
                                  memory.at<int8_t>(q), memory.at(scale));
    if (wrong > 0)
      fail(Status::kArgument, "step '", printable(name), "': ", wrong, " of ", n_rows,
           " rows hold infinite or NaN elements");
  });
  Value both;
  both.kind = Value::Kind::kList;
  both.items = {Value::of(q), Value::of(scale)};
  return both;
}

// Some neighbouring axes seen as one, where they lie so.
struct Joined {
  int64_t size = 1, stride = 1;
  bool uniform = true;

  Joined(const Tensor& t, size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      if (t.shape[i] == 1) continue;
      if (size > 1 && stride != t.shape[i] * t.strides[i]) uniform = false;
      size *= t.shape[i], stride = t.strides[i];
    }
  }
};

Value plan_pack(Planner& p, const Layer& layer, const Step& step) {
  Tensor x = p.real(step.arguments[0]);
  size_t axis = layer.dim == 1 ? 1 : x.rank() - 1;
  p.check(layer.dim == 1 ? x.rank() == 4 : x.rank() >= 1, "it takes images [N, C, H, W], or rows");
  p.check(x.shape[axis] == layer.length, "the packed axis has another length");
  auto walkable = [&](const Tensor& t) {
    Joined outer(t, 0, axis), inner(t, axis + 1, t.rank());
    bool rows = t.strides[axis] == 1 || t.shape[axis] == 1;
    return outer.uniform && inner.uniform && (rows || inner.stride == 1);
  };
  if (!walkable(x)) x = layer.dim == 1 ? p.nearest_channels(x) : p.dense(x);
  Joined outer(x, 0, axis), inner(x, axis + 1, x.rank());
  PackShape shape{};
  shape.dtype = Dtype::kFloat32;
  shape.n_outer = outer.size, shape.outer_stride = outer.stride;
  shape.n_groups = layer.groups, shape.length = layer.length / layer.groups;
  shape.length_stride = x.strides[axis], shape.group_stride = shape.length * x.strides[axis];
  if (shape.length == 1) shape.length_stride = 1;
  shape.n_inner = inner.size, shape.inner_stride = inner.stride;
  Sizes words = x.shape;
  words.erase(words.begin() + static_cast<std::ptrdiff_t>(axis));
  words.push_back(layer.groups * words_for(shape.length));
  Tensor to = p.make(Type::kI32, words);
  bool empty = to.count() == 0;
  p.emit({x}, {to}, 0, [=](const Memory& memory) {
    if (!empty) pack(shape, memory.at(x), memory.at<uint32_t>(to), nullptr);
  });
  return Value::of(to);
}

Value plan_regroup(Planner& p, const Layer& layer, const Step& step) {
  Tensor x = p.dense(p.words(step.arguments[0]));
  int64_t from_words = words_for(layer.length), length = layer.length / layer.groups,
          words = words_for(length);
  p.check(x.rank() >= 1 && x.shape.back() == from_words, "the words do not fit the channels");
  Sizes shape = x.shape;
  shape.back() = layer.groups * words;
  Tensor to = p.make(Type::kI32, shape);
  int64_t rows = x.count() / from_words, groups = layer.groups;
  p.emit({x}, {to}, static_cast<double>(rows * layer.length), [=](const Memory& memory) {
    const uint32_t* from = memory.at<uint32_t>(x);
    uint32_t* out = memory.at<uint32_t>(to);
    for (int64_t row = 0; row < rows; ++row, from += from_words) {
      for (int64_t g = 0; g < groups; ++g, out += words) {
        for (int64_t w = 0; w < words; ++w) {
          int64_t first = g * length + w * kWordBits,
                  n = std::min<int64_t>(kWordBits, length - w * kWordBits);
          int64_t word = first / kWordBits, shift = first % kWordBits;
          uint32_t bits = from[word] >> shift;
          if (shift > 0 && word + 1 < from_words) bits |= from[word + 1] << (kWordBits - shift);
          out[w] = bits & low_bits(static_cast<int>(n));
        }
      }
    }
  });
  return Value::of(to);
}

Value plan_flatten_bits(Planner& p, const Step& step) {
  Tensor x = p.dense(p.words(step.arguments[0]));
  p.check(x.rank() >= 1, "it takes words [N, ...]");
  int64_t n = 1;
  for (size_t i = 1; i < x.rank(); ++i) n *= x.shape[i];
  x.shape = {x.shape[0], n}, x.strides = {n, 1};
  return Value::of(x);
}

RealWeight real_weight(const Layer& layer) {
  return {.tensor = {}, .words = weight_words(layer), .shape = layer.weight_shape};
}

Value plan_real(Planner& p, const Layer& layer, const Step& step) {
  Tensor x = p.real(step.arguments[0]), bias;
  bias.shape = {layer.weight_shape[0]}, bias.strides = {1};
  bias.place.fixed = layer.floats("bias");
  const Tensor* added = bias.place.fixed ? &bias : nullptr;
  if (layer.kind == LayerKind::kRealLinear)
    return Value::of(plan_real_linear(p, x, real_weight(layer), added));
  Geometry g{};
  g.kernel = {{layer.weight_shape[2], layer.weight_shape[3]}};
  g.stride = layer.stride, g.padding = layer.padding, g.dilation = layer.dilation, g.groups = layer.groups;
  return Value::of(plan_real_conv(p, x, real_weight(layer), added, g));
}

}  // namespace

Value plan_layer(Planner& p, const Layer& layer, const Step& step) {
  switch (layer.kind) {
    case LayerKind::kPackedConv2d:
    case LayerKind::kSignedConv2d:
      return plan_conv(p, layer, step);
    case LayerKind::kPackedLinear:
    case LayerKind::kSignedLinear:
      return plan_dense(p, layer, step);
    case LayerKind::kRealConv2d:
    case LayerKind::kRealLinear:
      return plan_real(p, layer, step);
    case LayerKind::kQuantizeRows:
      return plan_quantize(p, layer, step);
    case LayerKind::kPack:
      return plan_pack(p, layer, step);
    case LayerKind::kRegroup:
      return plan_regroup(p, layer, step);
    case LayerKind::kFlattenBits:
      return plan_flatten_bits(p, step);
    case LayerKind::kPoolBits:
      return plan_pool_bits(p, layer, p.words(step.arguments[0]));
    case LayerKind::kMaxPool: {
      Tensor x = p.real(step.arguments[0]);
      return Value::of(plan_windows(p, x, pool_geometry(layer), Reduction::kMax, {}));
    }
    case LayerKind::kConstant:
      break;
  }
  return Value::of(fixed_tensor(*layer.tensor("value")));
}

}  // namespace bop2nd::runtime
