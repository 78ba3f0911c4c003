// SPDX-License-Identifier: Apache-2.0
#include "layer.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "../core/bit_layout.h"
#include "../core/epilogue.h"
#include "error.h"

namespace bop2nd::runtime {
namespace {

constexpr int64_t kInt31 = (int64_t{1} << 31) - 1, kDot = int64_t{1} << 24;
constexpr int64_t kMostMultiplied = int64_t{1} << 16;

struct Kind {
  const char* name;
  LayerKind kind;
  std::vector<const char*> attributes, tensors;
};

#define BOP2ND_NAME(name) #name,
constexpr const char* kPerOutput[] = {BOP2ND_PER_OUTPUT(BOP2ND_NAME)};
constexpr const char* kOfProducts[] = {"weight", "threshold", "bias", BOP2ND_PER_OUTPUT(BOP2ND_NAME)};
#undef BOP2ND_NAME

const std::vector<Kind>& kinds() {
  static const std::vector<const char*> of_products(std::begin(kOfProducts), std::end(kOfProducts));
  static const std::vector<Kind> all = {
      {.name = "packed_conv2d",
       .kind = LayerKind::kPackedConv2d,
       .attributes = {"stride", "padding", "dilation", "groups", "padding_value", "dtype", "emits", "low",
                      "high", "relu", "fp32_bytes"},
       .tensors = of_products},
      {.name = "packed_linear",
       .kind = LayerKind::kPackedLinear,
       .attributes = {"padding_bits", "dtype", "emits", "low", "high", "relu", "fp32_bytes"},
       .tensors = of_products},
      {.name = "signed_conv2d",
       .kind = LayerKind::kSignedConv2d,
       .attributes = {"stride", "padding", "dilation", "groups", "padding_value", "input", "multiplier",
                      "zero_point", "dtype", "emits", "low", "high", "relu", "fp32_bytes"},
       .tensors = of_products},
      {.name = "signed_linear",
       .kind = LayerKind::kSignedLinear,
       .attributes = {"input", "multiplier", "zero_point", "dtype", "emits", "low", "high", "relu",
                      "fp32_bytes"},
       .tensors = of_products},
      {.name = "real_conv2d",
       .kind = LayerKind::kRealConv2d,
       .attributes = {"stride", "padding", "dilation", "groups", "padding_value", "fp32_bytes"},
       .tensors = {"weight", "bias"}},
      {.name = "real_linear",
       .kind = LayerKind::kRealLinear,
       .attributes = {"fp32_bytes"},
       .tensors = {"weight", "bias"}},
      {.name = "quantize_rows", .kind = LayerKind::kQuantizeRows, .attributes = {"per_row"}, .tensors = {}},
      {.name = "pack", .kind = LayerKind::kPack, .attributes = {"dim", "length", "groups"}, .tensors = {}},
      {.name = "regroup", .kind = LayerKind::kRegroup, .attributes = {"length", "groups"}, .tensors = {}},
      {.name = "flatten_bits", .kind = LayerKind::kFlattenBits, .attributes = {}, .tensors = {}},
      {.name = "pool_bits",
       .kind = LayerKind::kPoolBits,
       .attributes = {"kernel_size", "stride", "padding", "dilation", "ceil_mode"},
       .tensors = {"decreasing"}},
      {.name = "max_pool",
       .kind = LayerKind::kMaxPool,
       .attributes = {"kernel_size", "stride", "padding", "dilation", "ceil_mode"},
       .tensors = {}},
      {.name = "constant", .kind = LayerKind::kConstant, .attributes = {}, .tensors = {"value"}},
  };
  return all;
}

// Pairs are written as lists or tuples.
Pair pair_of(const Json& value, const char* what, int64_t least) {
  const Json* list = &value;
  if (value.is(Json::Kind::kObject)) {
    value.check_size(1, what);
    list = &value.at("tuple", what);
  }
  const std::vector<Json>& items = list->as_list(what);
  require(items.size() == 2, what, " is no pair");
  return {{items[0].as_integer(what, least, kInt31), items[1].as_integer(what, least, kInt31)}};
}

void read_attribute(Layer& layer, const std::string& name, const Json& value) {
  const char* what = name.c_str();
  auto optional_dot = [&](bool& has, int32_t& to) {
    has = !value.is(Json::Kind::kNull);
    if (has) to = static_cast<int32_t>(value.as_integer(what, -kDot, kDot));
  };
  if (name == "stride") {
    layer.stride = pair_of(value, what, 1);
  } else if (name == "padding") {
    layer.padding = pair_of(value, what, 0);
  } else if (name == "dilation") {
    layer.dilation = pair_of(value, what, 1);
  } else if (name == "kernel_size") {
    layer.kernel_size = pair_of(value, what, 1);
  } else if (name == "groups") {
    layer.groups = value.as_integer(what, 1, kInt31);
  } else if (name == "padding_value") {
    bool real = layer.kind != LayerKind::kPackedConv2d;
    layer.padding_value = value.as_integer(what, real ? 0 : -1, real ? 0 : 1);
  } else if (name == "padding_bits") {
    layer.padding_bits = value.as_integer(what, 0, kInt31);
  } else if (name == "length") {
    layer.length = value.as_integer(what, layer.kind == LayerKind::kRegroup ? 1 : 0, kInt31);
  } else if (name == "dim") {
    layer.dim = value.as_integer(what, -1, 1);
    require(layer.dim != 0, "dim is neither 1 nor -1");
  } else if (name == "ceil_mode") {
    layer.ceil_mode = value.as_bool(what);
  } else if (name == "low") {
    optional_dot(layer.has_low, layer.low);
  } else if (name == "high") {
    optional_dot(layer.has_high, layer.high);
  } else if (name == "relu") {
    require(value.is(Json::Kind::kNull) || value.is(Json::Kind::kTrue), "relu is neither null nor true");
    layer.relu = value.is(Json::Kind::kTrue);
  } else if (name == "dtype") {
    require(value.as_text(what) == "float32", "a layer of profile 'bits' has another dtype than float32");
  } else if (name == "input") {
    const std::string& text = value.as_text(what);
    require(text == "real" || text == "int8" || text == "uint8", "input is '", printable(text), "'");
    layer.input = text == "real" ? Type::kF32 : text == "int8" ? Type::kI8 : Type::kU8;
  } else if (name == "multiplier") {
    layer.multiplier = static_cast<int32_t>(value.as_integer(what, 1, kMostMultiplied));
  } else if (name == "zero_point") {
    layer.zero_point = static_cast<int32_t>(value.as_integer(what, -kInt31 - 1, kInt31));
  } else if (name == "per_row") {
    layer.per_row = value.as_bool(what);
  } else if (name == "fp32_bytes") {
    value.as_integer(what, 0, INT64_MAX);
  } else if (!value.is(Json::Kind::kNull)) {  // emits
    const std::string& text = value.as_text(what);
    require(text == "values" || text == "signs" || text == "both", "emits is '", printable(text), "'");
    layer.emits = text == "values"  ? Layer::Emits::kValues
                  : text == "signs" ? Layer::Emits::kSigns
                                    : Layer::Emits::kBoth;
  }
}

void check_name(const std::string& name, const char* what) {
  bool printed = std::all_of(name.begin(), name.end(), [](char c) { return (c & 0xE0) != 0 && c != 0x7F; });
  require(printed && name.size() <= 1024, what, " has no printable name of at most 256 characters");
}

// Words that fit their layout.
Sizes read_layout(const Stored& words, const Json& layout) {
  layout.check_size(5, "a layout");
  layout.at("version", "a layout").as_integer("a layout's version", 1, 1);
  const std::string& dtype = layout.at("dtype", "a layout").as_text("a layout's dtype");
  require(dtype == "float32" || dtype == "float64" || dtype == "float16" || dtype == "bfloat16",
          "a layout of unknown dtype");
  Sizes shape;
  for (const Json& size : layout.at("shape", "a layout").as_list("a layout's shape"))
    shape.push_back(size.as_integer("a layout's size", 0, kInt31));
  require(!shape.empty(), "a layout has no axes");
  size_t dim = static_cast<size_t>(
      layout.at("dim", "a layout").as_integer("a layout's dim", 0, static_cast<int64_t>(shape.size()) - 1));
  int64_t length = layout.at("length", "a layout").as_integer("a layout's length", 0, kInt31);
  require(length == shape[dim], "a layout's length contradicts its shape");
  Sizes expected = shape;
  expected.erase(expected.begin() + static_cast<std::ptrdiff_t>(dim));
  expected.push_back(words_for(length));
  require(words.type == Type::kI32 && words.shape == expected, "words do not fit their layout");
  int64_t row = expected.back(), n = words.count();
  const uint32_t* values = static_cast<const uint32_t*>(words.data);
  if (length % kWordBits != 0) {
    for (int64_t i = row - 1; i < n; i += row)
      require(values[i] >> (length % kWordBits) == 0, "bits behind the last of ", length, " are set");
  }
  return shape;
}

void check_tensor(const Layer& layer, const char* key, Type type, int64_t n) {
  const Stored* tensor = layer.tensor(key);
  require(!tensor || (tensor->type == type && tensor->shape == Sizes{n}), layer.kind_name, ": ", key,
          " must be ", n, " numbers of its type");
}

// Of sums of real numbers, or of integers that stay within 32 bits.
void check_signed(const Layer& layer) {
  if (layer.input == Type::kF32) {
    require(!layer.tensor("threshold") && layer.multiplier == 1 && layer.zero_point == 0, layer.kind_name,
            ": thresholds, multiplier and zero_point belong to integers");
    return;
  }
  int64_t m = layer.multiplier, zero = layer.zero_point;
  int64_t low = layer.input == Type::kI8 ? -128 * m : 0, high = layer.input == Type::kI8 ? 127 * m : 255 * m;
  require(low <= zero && zero <= high, layer.kind_name, ": zero_point is out of the range of its input");
  int64_t products = 1;  // below 2^31 axis by axis, so that this cannot overflow before it is refused
  for (size_t axis = 1; axis < layer.weight_shape.size(); ++axis) {
    products *= layer.weight_shape[axis];
    require(products * std::max(zero - low, high - zero) <= kInt31, layer.kind_name, ": sums of ", products,
            " products exceed 32 bits");
  }
}

void check_product(const Layer& layer) {
  bool image = layer.kind == LayerKind::kPackedConv2d || layer.kind == LayerKind::kRealConv2d ||
               layer.kind == LayerKind::kSignedConv2d;
  require(layer.weight_shape.size() == (image ? 4u : 2u), layer.kind_name, ": its weight has other axes");
  const Stored& weight = *layer.tensor("weight");
  // The packed axis is the second one: words lie [O, ..., words].
  require(weight.shape.back() == words_for(layer.weight_shape[1]) && weight.shape[0] == layer.weight_shape[0],
          layer.kind_name, ": its weight is packed along another axis");
  require(weight.count() > 0, layer.kind_name, ": its weight has no elements");
  int64_t n = layer.weight_shape[0];
  require(n % layer.groups == 0, layer.kind_name, ": the groups do not divide the outputs");
  check_tensor(layer, "bias", Type::kF32, n);
  check_tensor(layer, "threshold", Type::kI32, n);
  bool tail = layer.emits != Layer::Emits::kPlain, more = layer.has_low || layer.has_high || layer.relu;
  for (const char* key : kPerOutput) {
    check_tensor(layer, key, Type::kF32, n);
    more = more || layer.tensor(key);
  }
  require(tail || !more, layer.kind_name, ": a tail belongs to a layer with emits");
  require(!layer.tensor("threshold") || (!tail && !layer.tensor("bias")), layer.kind_name,
          ": thresholds stand alone");
  require(!tail || !layer.tensor("bias"), layer.kind_name, ": a layer with emits has its bias in the shift");
  require(!(layer.relu && layer.tensor("slope")), layer.kind_name, ": relu and slope exclude each other");
  require(!layer.tensor("sign_shift") || layer.emits != Layer::Emits::kValues, layer.kind_name,
          ": sign_shift belongs to a layer that emits signs");
  int32_t low = layer.has_low ? layer.low : -static_cast<int32_t>(kDot);
  require(low <= (layer.has_high ? layer.high : kDot), layer.kind_name, ": low is above high");
  if (layer.is_signed()) check_signed(layer);
  require(layer.padding_bits <= layer.weight_shape[1], layer.kind_name, ": more padding bits than bits");
}

void check_layer(const Layer& layer) {
  if (layer.is_product()) return check_product(layer);
  if (layer.kind == LayerKind::kPack)
    require(layer.length % layer.groups == 0 && (layer.dim == 1 || layer.groups == 1),
            "pack: groups do not divide the length, or are asked of rows");
  if (layer.kind == LayerKind::kRegroup)
    require(layer.length % layer.groups == 0, "regroup: the groups do not divide the length");
  if (layer.kind == LayerKind::kPoolBits || layer.kind == LayerKind::kMaxPool) {
    for (int axis = 0; axis < 2; ++axis)
      require(2 * layer.padding[axis] <= layer.kernel_size[axis], layer.kind_name,
              ": the padding is at most half the window");
  }
  if (const Stored* decreasing = layer.tensor("decreasing"))
    require(decreasing->type == Type::kI32 && decreasing->shape.size() == 1,
            "pool_bits: decreasing is no row");
  if (layer.kind == LayerKind::kConstant)
    require(layer.tensor("value") && layer.tensor("value")->type == Type::kF32, "constant: no float32 value");
}

}  // namespace

const Stored* Layer::tensor(std::string_view key) const {
  auto at = tensors.find(key);
  return at == tensors.end() ? nullptr : &at->second;
}

const float* Layer::floats(std::string_view key) const {
  const Stored* found = tensor(key);
  return found ? static_cast<const float*>(found->data) : nullptr;
}

bool Layer::takes_words() const {
  return kind == LayerKind::kPackedConv2d || kind == LayerKind::kPackedLinear ||
         kind == LayerKind::kRegroup || kind == LayerKind::kFlattenBits || kind == LayerKind::kPoolBits;
}

const char* Layer::operand() const {
  return kind == LayerKind::kConstant ? nullptr : takes_words() ? "words" : "input";
}

const char* Layer::second_operand() const {
  return kind <= LayerKind::kPackedLinear ? "residual" : is_signed() ? "input_scale" : nullptr;
}

Layer read_layer(const std::string& name, const Json& described, StoredTensors& left) {
  check_name(name, "a layer");
  require(!name.empty() && name.find('.') == std::string::npos,
          "a layer has an empty name or one with a dot");
  described.check_size(4, "a layer");
  const std::string& kind_name = described.at("kind", "a layer").as_text("a layer's kind");
  auto kind =
      std::find_if(kinds().begin(), kinds().end(), [&](const Kind& k) { return kind_name == k.name; });
  require(kind != kinds().end(), "a layer is of unknown kind '", printable(kind_name), "'");
  Layer layer{};
  layer.name = name, layer.kind = kind->kind, layer.kind_name = kind->name;
  const Json& attributes = described.at("attributes", "a layer");
  attributes.check_size(kind->attributes.size(), "a layer's attributes");
  for (const char* attribute : kind->attributes)
    read_attribute(layer, attribute, attributes.at(attribute, "a layer's attributes"));
  for (const Json& key : described.at("tensors", "a layer").as_list("a layer's tensors")) {
    const std::string& text = key.as_text("a tensor's name");
    bool known = std::any_of(kind->tensors.begin(), kind->tensors.end(),
                             [&](const char* tensor) { return text == tensor; });
    require(known, kind->name, " has no tensor '", printable(text), "'");
    auto found = left.find("layers." + name + "." + text);
    require(found != left.end(), "a tensor of layer '", printable(name), "' is missing, or named twice");
    layer.tensors.emplace(text, found->second);
    left.erase(found);
  }
  const Json& layouts = described.at("layouts", "a layer").as_object("layouts");
  for (size_t i = 0; i < layouts.keys.size(); ++i) {
    const Stored* words = layer.tensor(layouts.keys[i]);
    require(words && layouts.keys[i] == "weight", "a layout for what is no weight");
    layer.weight_shape = read_layout(*words, layouts.items[i]);
    require(layouts.items[i].at("dim", "a layout").integer == 1, "a weight is packed along another axis");
  }
  require(!layer.is_product() || !layer.weight_shape.empty(), kind->name, " has no weight with a layout");
  check_layer(layer);
  return layer;
}

}  // namespace bop2nd::runtime
