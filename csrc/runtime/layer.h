// SPDX-License-Identifier: Apache-2.0
// A layer of a packed file (docs/packed_file.md, section 5): its attributes and tensors, checked.
#pragma once

#include <map>
#include <string>

#include "json.h"
#include "packed_tensors.h"

namespace bop2nd::runtime {

enum class LayerKind {
  kPackedConv2d,
  kPackedLinear,
  kSignedConv2d,
  kSignedLinear,
  kRealConv2d,
  kRealLinear,
  kQuantizeRows,
  kPack,
  kRegroup,
  kFlattenBits,
  kPoolBits,
  kMaxPool,
  kConstant
};

struct Pair {
  int64_t at[2];
  int64_t operator[](int axis) const { return at[axis]; }
};

struct Layer {
  std::string name;
  LayerKind kind;
  const char* kind_name;
  // Attributes, where the kind has them.
  Pair stride{{1, 1}}, padding{{0, 0}}, dilation{{1, 1}}, kernel_size{{1, 1}};
  int64_t groups = 1, padding_value = 0, padding_bits = 0, dim = 0, length = 0;
  bool ceil_mode = false, relu = false, has_low = false, has_high = false;
  int32_t low = 0, high = 0;
  Type input = Type::kF32;  // of products by signs: float32, int8 or uint8
  int32_t multiplier = 1, zero_point = 0;
  bool per_row = false;
  enum class Emits { kPlain, kValues, kSigns, kBoth } emits = Emits::kPlain;
  std::map<std::string, Stored, std::less<>> tensors;
  Sizes weight_shape;  // logical

  const Stored* tensor(std::string_view key) const;
  const float* floats(std::string_view key) const;  // null if there are none
  bool is_product() const { return kind <= LayerKind::kRealLinear; }
  bool takes_words() const;
  bool gives_values() const { return emits != Emits::kSigns && !tensor("threshold"); }
  bool gives_signs() const { return emits == Emits::kSigns || emits == Emits::kBoth || tensor("threshold"); }
  bool is_signed() const { return kind == LayerKind::kSignedConv2d || kind == LayerKind::kSignedLinear; }
  // The operands' names: the first one, and one that may follow; null if there is none.
  const char* operand() const;
  const char* second_operand() const;
  bool may_have_residual() const { return kind <= LayerKind::kPackedLinear && emits != Emits::kPlain; }
};

// Takes the layer's tensors out of those that are left.
Layer read_layer(const std::string& name, const Json& described, StoredTensors& left);

}  // namespace bop2nd::runtime
