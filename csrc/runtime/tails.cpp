// SPDX-License-Identifier: Apache-2.0
// Batch norm behind a convolution, and signs behind that, become the convolution's epilogue where nobody else
// reads what lies between: one walk over memory instead of three.
#include <cstring>

#include "operators.h"
#include "plan.h"

namespace bop2nd::runtime {
namespace {

void count_uses(const Argument& argument, std::vector<int>& uses) {
  if (argument.is(Argument::Kind::kReference)) ++uses[static_cast<size_t>(argument.integer)];
  for (const Argument& item : argument.items) count_uses(item, uses);
}

bool reads(const Argument& argument, size_t value) {
  return argument.is(Argument::Kind::kReference) && static_cast<size_t>(argument.integer) == value;
}

// A convolution of which only the sums are asked for. (Rows may have axes of their own before the features:
// which of them batch norm goes along, only their sizes tell.)
bool is_bare(const Layer& layer) {
  return (layer.kind == LayerKind::kPackedConv2d || layer.kind == LayerKind::kSignedConv2d) &&
         layer.emits == Layer::Emits::kPlain && !layer.tensor("threshold") && !layer.tensor("bias");
}

// Of constants with a number for each of n channels.
bool is_norm(const Graph& graph, const Step& step, size_t value, int64_t n) {
  if (step.kind != Step::Kind::kOperator || std::strcmp(step.op->name, kBatchNorm) != 0) return false;
  if (!reads(step.arguments[0], value)) return false;
  for (size_t i = 1; i <= 4; ++i) {
    const Argument& row = step.arguments[i];
    if (row.is(Argument::Kind::kNull) && i <= 2) continue;
    size_t at = row.is(Argument::Kind::kReference) ? static_cast<size_t>(row.integer) : SIZE_MAX;
    if (at >= graph.constants.size() || graph.constants[at].tensor.shape != Sizes{n}) return false;
  }
  const Argument &training = step.arguments[5], &eps = step.arguments[7];
  return training.is(Argument::Kind::kBool) && training.integer == 0 && eps.is(Argument::Kind::kReal);
}

bool is_pack(const Graph& graph, const Step& step, size_t value, const Layer& product) {
  if (step.kind != Step::Kind::kLayer || !reads(step.arguments[0], value)) return false;
  const Layer& layer = graph.layers[step.layer];
  return layer.kind == LayerKind::kPack && layer.groups == 1 && layer.length == product.weight_shape[0] &&
         layer.dim == 1;
}

}  // namespace

std::vector<Tail> tails_of(const Graph& graph) {
  size_t n_constants = graph.constants.size(), n = graph.steps.size();
  std::vector<int> uses(n_constants + n);
  std::vector<size_t> reader(n_constants + n, n);  // a step whose first argument it is
  for (size_t i = 0; i < n; ++i) {
    const std::vector<Argument>& arguments = graph.steps[i].arguments;
    for (const Argument& argument : arguments) count_uses(argument, uses);
    if (!arguments.empty() && arguments[0].is(Argument::Kind::kReference))
      reader[static_cast<size_t>(arguments[0].integer)] = i;
  }
  count_uses(graph.output, uses);
  std::vector<Tail> tails(n);
  auto only_reader = [&](size_t step) {
    return uses[n_constants + step] == 1 ? reader[n_constants + step] : n;
  };
  for (size_t i = 0; i < n; ++i) {
    const Step& step = graph.steps[i];
    if (step.kind != Step::Kind::kLayer || !is_bare(graph.layers[step.layer])) continue;
    const Layer& product = graph.layers[step.layer];
    size_t norm = only_reader(i);
    if (norm == n || !is_norm(graph, graph.steps[norm], n_constants + i, product.weight_shape[0])) continue;
    tails[i].norm = &graph.steps[norm];
    tails[norm].part_of = &graph.steps[i];
    size_t pack = only_reader(norm);
    if (pack == n || !is_pack(graph, graph.steps[pack], n_constants + norm, product)) continue;
    tails[i].signs = true;
    tails[pack].part_of = &graph.steps[i];
  }
  return tails;
}

Layer with_tail(const Layer& product, const Tail& tail, const float* scale, const float* shift) {
  Layer made = product;
  made.emits = tail.signs ? Layer::Emits::kSigns : Layer::Emits::kValues;
  Sizes row{product.weight_shape[0]};
  made.tensors["scale"] = {.type = Type::kF32, .shape = row, .data = scale};
  made.tensors["shift"] = {.type = Type::kF32, .shape = row, .data = shift};
  return made;
}

}  // namespace bop2nd::runtime
