// SPDX-License-Identifier: Apache-2.0
// The graph of a packed file (docs/packed_file.md, sections 4 and 6), every field and reference checked.
#pragma once

#include <string>
#include <vector>

#include "layer.h"

namespace bop2nd::runtime {

// A tree of arguments.
struct Argument {
  enum class Kind : uint8_t {
    kNull,
    kBool,
    kInteger,
    kReal,
    kText,
    kReference,
    kList,
    kTuple,
    kDict,
    kOther
  };
  Kind kind = Kind::kNull;
  int64_t integer = 0;  // also of kBool; of kReference the index of the value
  double real = 0;
  std::string text;
  std::vector<Argument> items;  // of kDict: key, value, key, value ...

  bool is(Kind other) const { return kind == other; }
};

struct Operator;  // operators.h

struct Step {
  enum class Kind : uint8_t { kInput, kLayer, kOperator };
  Kind kind;
  std::string name;
  size_t layer = 0;                 // index in Graph::layers
  const Operator* op = nullptr;     // of kOperator
  std::vector<Argument> arguments;  // in the order of operands or of the operator's names
};

struct InputSpec {
  std::string name;
  Type type = Type::kF32;
  Sizes shape;
  std::vector<bool> free;
};

struct Constant {
  std::string name;
  Stored tensor;
};

// Values have indices: first the constants, then the results of the steps.
struct Graph {
  std::vector<InputSpec> inputs;  // in the order of their steps
  std::vector<Constant> constants;
  std::vector<Layer> layers;
  std::vector<Step> steps;  // without the output
  Argument output;
};

// A whole network's inputs are float32, int8 or uint8; those of a part may be int32 words as well.
enum class Scope : uint8_t { kNetwork, kPart };
Graph read_graph(std::string_view json, StoredTensors tensors, Scope scope);

}  // namespace bop2nd::runtime
