// SPDX-License-Identifier: Apache-2.0
#include "network.h"

#include <algorithm>
#include <sstream>

#include "error.h"
#include "operators.h"
#include "plan.h"

namespace bop2nd::runtime {
namespace {

constexpr size_t kPlans = 16;  // sets of input shapes that a context keeps

std::string text_of(const Sizes& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

void check_input(const InputSpec& spec, const Array& input, bool needs_data, bool any_shape) {
  auto refuse = [&](const std::string& what) {
    fail(Status::kArgument, "input '", printable(spec.name), "' ", what);
  };
  if (input.type != spec.type)
    refuse(std::string("is ") + name_of(input.type) + ", not " + name_of(spec.type));
  bool fits = (any_shape || input.shape.size() == spec.shape.size()) && extent(input.shape) > 0;
  for (size_t i = 0; fits && !any_shape && i < spec.shape.size(); ++i)
    fits = spec.free[i] || input.shape[i] == spec.shape[i];
  if (!fits) refuse("must be like " + text_of(spec.shape) + ", got " + text_of(input.shape));
  if (needs_data && !input.data && product(input.shape) > 0) refuse("has no data");
  if (reinterpret_cast<uintptr_t>(input.data) % static_cast<uintptr_t>(bytes_of(input.type)) != 0)
    refuse("does not start on a multiple of an element's bytes");
}

void check_inputs(const Network& network, const std::vector<Array>& inputs, bool needs_data) {
  const Graph& graph = network.graph();
  if (inputs.size() != graph.inputs.size())
    fail(Status::kArgument, "the network takes ", graph.inputs.size(), " inputs, got ", inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i)
    check_input(graph.inputs[i], inputs[i], needs_data, network.is_part());
}

}  // namespace

Network::Network(std::unique_ptr<MappedFile> file, const void* bytes, size_t n, const Limits& limits)
    : file_(std::move(file)), limits_(limits) {
  PackedTensors read = read_tensors(static_cast<const uint8_t*>(bytes), n);
  copies_ = std::move(read.copies);
  graph_ = read_graph(read.graph, std::move(read.tensors), Scope::kNetwork);
  look_at_outputs();
}

std::shared_ptr<const Network> Network::part(std::string_view graph, StoredTensors tensors,
                                             NormRounding norms) {
  std::shared_ptr<Network> made(new Network);
  made->limits_ = no_limits(), made->norms_ = norms;
  made->graph_ = read_graph(graph, std::move(tensors), Scope::kPart);
  return made;
}

std::shared_ptr<const Network> Network::from_file(const char* path, const Limits& limits) {
  auto file = std::make_unique<MappedFile>(path, limits.file_bytes);
  const uint8_t* bytes = file->data();
  size_t n = file->size();
  try {
    return std::shared_ptr<const Network>(new Network(std::move(file), bytes, n, limits));
  } catch (const Error& error) {
    fail(error.status, path, ": ", error.what());
  }
}

std::shared_ptr<const Network> Network::from_memory(const void* bytes, size_t n, const Limits& limits) {
  if (reinterpret_cast<uintptr_t>(bytes) % 8 != 0)
    fail(Status::kArgument, "the bytes do not start on 8 bytes");
  if (n > limits.file_bytes) fail(Status::kLimit, n, " bytes, ", limits.file_bytes, " are allowed");
  return std::shared_ptr<const Network>(new Network(nullptr, bytes, n, limits));
}

// A plan for the sizes that the file itself names: what contradicts itself is refused here.
void Network::look_at_outputs() {
  std::vector<Array> inputs;
  for (const InputSpec& input : graph_.inputs) inputs.push_back({.type = input.type, .shape = input.shape});
  try {
    check_inputs(*this, inputs, false);
    outputs_ = Planner(*this, inputs, nullptr).plan()->outputs;
  } catch (const Error& error) {
    fail(error.status == Status::kArgument ? Status::kFile : error.status,
         "the graph does not describe a model: ", error.what());
  } catch (const std::invalid_argument& error) {
    fail(Status::kFile, "the graph does not describe a model: ", error.what());
  }
}

std::string Network::describe() const {
  std::ostringstream text;
  int64_t bytes = 0;
  for (const Constant& constant : graph_.constants) bytes += constant.tensor.n_bytes();
  for (const Layer& layer : graph_.layers) {
    for (const auto& tensor : layer.tensors) bytes += tensor.second.n_bytes();
  }
  text << "packed network, " << bytes << " bytes of tensors\n";
  for (const InputSpec& input : graph_.inputs)
    text << "  input " << printable(input.name) << " " << name_of(input.type) << " " << text_of(input.shape)
         << "\n";
  for (const Step& step : graph_.steps) {
    if (step.kind == Step::Kind::kInput) continue;
    text << "  " << printable(step.name) << " = ";
    if (step.kind == Step::Kind::kOperator) {
      text << step.op->name << "\n";
      continue;
    }
    const Layer& layer = graph_.layers[step.layer];
    text << layer.kind_name;
    if (layer.is_product()) text << " " << text_of(layer.weight_shape);
    text << "\n";
  }
  for (const OutputSpec& output : outputs_)
    text << "  output " << printable(output.name) << " " << name_of(output.type) << " "
         << text_of(output.shape) << "\n";
  return text.str();
}

Context::Context(std::shared_ptr<const Network> network, int n_threads)
    : network_(std::move(network)),
      pool_(n_threads > 0 ? std::make_unique<WorkerPool>(n_threads) : nullptr) {}

Context::~Context() = default;

Plan& Context::plan_for(const std::vector<Array>& inputs, const Sizes* strides) {
  auto found = std::find_if(plans_.begin(), plans_.end(),
                            [&](const auto& plan) { return plan->fits(inputs, strides); });
  if (found == plans_.end()) {
    auto plan = Planner(*network_, inputs, strides).plan();
    if (plans_.size() >= kPlans) plans_.pop_back();
    plans_.insert(plans_.begin(), std::move(plan));
  } else {
    std::rotate(plans_.begin(), found, found + 1);
  }
  Plan& plan = *plans_.front();
  if (arena_.size() < plan.arena_bytes) {
    arena_ = {};  // first gone, then made
    arena_ = Aligned<uint8_t>(plan.arena_bytes);
  }
  return plan;
}

const std::vector<Array>& Context::run(const std::vector<Array>& inputs, std::vector<StepTime>* times) {
  check_inputs(*network_, inputs, true);
  PoolScope scope(pool_ ? &pool_->pool() : nullptr);
  return plan_for(inputs, nullptr).run(arena_.data(), inputs, nullptr, times);
}

void Context::run_into(const std::vector<Array>& inputs, const Sizes& strides, const Allocate& allocate) {
  check_inputs(*network_, inputs, true);
  PoolScope scope(pool_ ? &pool_->pool() : nullptr);
  plan_for(inputs, &strides).run(arena_.data(), inputs, &allocate, nullptr);
}

}  // namespace bop2nd::runtime
