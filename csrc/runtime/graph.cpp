// SPDX-License-Identifier: Apache-2.0
#include "graph.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "error.h"
#include "operators.h"

namespace bop2nd::runtime {
namespace {

constexpr int kDepth = 64;
constexpr size_t kTextBytes = 4 * 256;

using Names = std::map<std::string, int64_t, std::less<>>;

const std::string& text_of(const Json& value, const char* what) {
  const std::string& text = value.as_text(what);
  bool printed = std::all_of(text.begin(), text.end(), [](char c) { return (c & 0xE0) != 0 && c != 0x7F; });
  require(printed && text.size() <= kTextBytes, what, " is no printable text of at most 256 characters");
  return text;
}

class Reader {
 public:
  Graph graph;

  explicit Reader(Scope scope) : scope_(scope) {}

  void read(const Json& json, StoredTensors tensors) {
    json.check_size(5, "the graph");
    read_constants(json.at("constants", "the graph"), tensors);
    const Json& layers = json.at("layers", "the graph").as_object("the layers");
    for (size_t i = 0; i < layers.keys.size(); ++i) {
      layer_of_.emplace(layers.keys[i], static_cast<int64_t>(i));
      graph.layers.push_back(read_layer(layers.keys[i], layers.items[i], tensors));
    }
    require(tensors.empty(), "tensor '", tensors.empty() ? "" : printable(tensors.begin()->first),
            "' belongs to nothing");
    for (const Json& input : json.at("inputs", "the graph").as_list("the inputs")) read_input(input);
    const std::vector<Json>& steps = json.at("steps", "the graph").as_list("the steps");
    require(!steps.empty(), "the graph has no output");
    for (size_t i = 0; i < steps.size(); ++i) read_step(steps[i], i + 1 == steps.size());
    require(n_inputs_ == graph.inputs.size(), "the inputs are not those of the steps");
    check_signature(json.at("signature", "the graph"));
  }

 private:
  Scope scope_;
  Names values_, layer_of_;
  size_t n_inputs_ = 0;

  void define(const std::string& name) {
    int64_t index = static_cast<int64_t>(values_.size());
    require(values_.emplace(name, index).second, "two values have the name '", printable(name), "'");
  }

  void read_constants(const Json& names, StoredTensors& tensors) {
    for (const Json& json : names.as_list("the constants")) {
      const std::string& name = text_of(json, "a constant's name");
      auto found = tensors.find("constants." + name);
      require(found != tensors.end(), "constant '", printable(name), "' is missing, or named twice");
      require(found->second.type == Type::kF32, "a constant of profile 'bits' is not float32");
      define(name);
      graph.constants.push_back({.name = name, .tensor = found->second});
      tensors.erase(found);
    }
  }

  void read_input(const Json& json) {
    json.check_size(4, "an input");
    InputSpec input;
    input.name = text_of(json.at("name", "an input"), "an input's name");
    for (const Json& size : json.at("shape", "an input").as_list("an input's shape"))
      input.shape.push_back(size.as_integer("an input's size", 0, (int64_t{1} << 48) - 1));
    for (const Json& free : json.at("free", "an input").as_list("an input's free axes"))
      input.free.push_back(free.as_bool("a free axis"));
    require(input.shape.size() == input.free.size() && input.shape.size() <= kMaxAxes,
            "an input has other free axes than axes, or more than 16");
    const std::string& dtype = json.at("dtype", "an input").as_text("an input's dtype");
    for (Type type : {Type::kI8, Type::kU8, Type::kI32}) {
      if (dtype == name_of(type)) input.type = type;
    }
    require(dtype == name_of(input.type) && (input.type != Type::kI32 || scope_ == Scope::kPart),
            "an input of profile 'bits' is neither float32 nor int8 nor uint8");
    graph.inputs.push_back(std::move(input));
  }

  void read_step(const Json& json, bool last) {
    const std::string& name = text_of(json.at("name", "a step"), "a step's name");
    const std::string& kind = json.at("kind", "a step").as_text("a step's kind");
    require((kind == "output") == last, "the output is not the last step");
    if (last) {
      json.check_size(3, "an output");
      graph.output = tree(json.at("value", "an output"), 0);
      return;
    }
    Step step{};
    step.name = name;
    if (kind == "input") {
      json.check_size(2, "an input step");
      step.kind = Step::Kind::kInput;
      require(n_inputs_ < graph.inputs.size() && graph.inputs[n_inputs_].name == name,
              "the inputs are not those of the steps");
      ++n_inputs_;
    } else if (kind == "layer") {
      json.check_size(4, "a layer's step");
      read_call(step, json);
    } else {
      require(kind == "operator", "a step is of unknown kind '", printable(kind), "'");
      json.check_size(4, "an operator's step");
      read_operator(step, json);
    }
    define(name);
    graph.steps.push_back(std::move(step));
  }

  void read_call(Step& step, const Json& json) {
    step.kind = Step::Kind::kLayer;
    auto found = layer_of_.find(json.at("layer", "a step").as_text("a layer's name"));
    require(found != layer_of_.end(), "step '", printable(step.name), "' calls a layer that is not there");
    step.layer = static_cast<size_t>(found->second);
    const Layer& layer = graph.layers[step.layer];
    const Json& arguments = json.at("arguments", "a step").as_object("a step's arguments");
    size_t n = 0;
    if (layer.operand())
      step.arguments.push_back(tree(arguments.at(layer.operand(), "a step's arguments"), 0)), ++n;
    const Json* second = layer.second_operand() ? arguments.find(layer.second_operand()) : nullptr;
    if (second) step.arguments.push_back(tree(*second, 0)), ++n;
    arguments.check_size(n, "a step's arguments");
  }

  void read_operator(Step& step, const Json& json) {
    step.kind = Step::Kind::kOperator;
    const std::string& name = json.at("operator", "a step").as_text("an operator's name");
    step.op = find_operator(name);
    require(step.op, "'", printable(name), "' is not an operator of profile 'bits'");
    const Json& arguments = json.at("arguments", "a step");
    if (step.op->arguments.empty()) {
      for (const Json& argument : arguments.as_list("a step's arguments"))
        step.arguments.push_back(tree(argument, 0));
      require(step.arguments.size() == step.op->n_positions, name, " takes ", step.op->n_positions,
              " arguments");
      return;
    }
    arguments.check_size(step.op->arguments.size(), "a step's arguments");
    for (const char* key : step.op->arguments)
      step.arguments.push_back(tree(arguments.at(key, step.op->name), 0));
  }

  Argument tree(const Json& json, int depth) {
    require(depth <= kDepth, "arguments are nested more than ", kDepth, " deep");
    Argument value;
    using Kind = Argument::Kind;
    switch (json.kind) {
      case Json::Kind::kNull:
        break;
      case Json::Kind::kFalse:
      case Json::Kind::kTrue:
        value.kind = Kind::kBool, value.integer = json.is(Json::Kind::kTrue);
        break;
      case Json::Kind::kInteger:
        value.kind = Kind::kInteger, value.integer = json.integer;
        break;
      case Json::Kind::kReal:
        value.kind = Kind::kReal, value.real = json.real;
        break;
      case Json::Kind::kText:
        value.kind = Kind::kText, value.text = text_of(json, "an argument");
        break;
      case Json::Kind::kList:
        value.kind = Kind::kList;
        for (const Json& item : json.items) value.items.push_back(tree(item, depth + 1));
        break;
      case Json::Kind::kObject:
        special(value, json, depth);
    }
    return value;
  }

  // An object with one key.
  void special(Argument& value, const Json& json, int depth) {
    json.check_size(1, "an argument");
    const std::string& key = json.keys[0];
    const Json& inner = json.items[0];
    using Kind = Argument::Kind;
    if (key == "ref") {
      auto found = values_.find(inner.as_text("a reference"));
      require(found != values_.end(), "a step reads '", printable(inner.text),
              "', which no earlier step makes");
      value.kind = Kind::kReference, value.integer = found->second;
    } else if (key == "tuple") {
      value.kind = Kind::kTuple;
      for (const Json& item : inner.as_list("a tuple")) value.items.push_back(tree(item, depth + 1));
    } else if (key == "dict") {
      value.kind = Kind::kDict;
      for (const Json& item : inner.as_list("a dict")) {
        const std::vector<Json>& entry = item.as_list("an entry of a dict");
        require(entry.size() == 2, "an entry of a dict is no pair");
        value.items.push_back(tree(entry[0], depth + 1));
        value.items.push_back(tree(entry[1], depth + 1));
      }
    } else if (key == "float") {
      const std::string& text = inner.as_text("a float");
      require(text == "inf" || text == "-inf" || text == "nan", "an unknown float");
      value.kind = Kind::kReal;
      value.real = text == "nan" ? std::numeric_limits<double>::quiet_NaN()
                                 : std::numeric_limits<double>::infinity() * (text == "inf" ? 1 : -1);
    } else {
      require(key == "dtype" || key == "memory_format", "an argument of unknown kind '", printable(key), "'");
      value.kind = Kind::kOther, value.text = text_of(inner, "an argument");
    }
  }

  // Only its form: the runtime takes inputs in their order.
  void check_signature(const Json& json) {
    json.check_size(2, "the signature");
    for (const Json& parameter : json.at("parameters", "the signature").as_list("the parameters")) {
      bool has_default = parameter.as_object("a parameter").find("default") != nullptr;
      parameter.check_size(has_default ? 3 : 2, "a parameter");
      text_of(parameter.at("name", "a parameter"), "a parameter's name");
      const std::string& kind = parameter.at("kind", "a parameter").as_text("a parameter's kind");
      bool known =
          kind == "positional" || kind == "any" || kind == "args" || kind == "keyword" || kind == "kwargs";
      require(known, "a parameter is of unknown kind '", printable(kind), "'");
      if (has_default) tree(parameter.at("default", "a parameter"), 0);
    }
    const Json& call = json.at("call", "the signature").as_object("the call");
    for (const Json& argument : call.items) tree(argument, 0);
  }
};

}  // namespace

Graph read_graph(std::string_view json, StoredTensors tensors, Scope scope) {
  Reader reader(scope);
  reader.read(parse_json(json), std::move(tensors));
  return std::move(reader.graph);
}

const Operator* find_operator(std::string_view name) {
  for (const auto* list :
       {&number_operators(), &elementwise_operators(), &shape_operators(), &window_operators()}) {
    for (const Operator& found : *list) {
      if (name == found.name) return &found;
    }
  }
  return nullptr;
}

}  // namespace bop2nd::runtime
