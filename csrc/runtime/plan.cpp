// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <numeric>

#include "operators.h"

namespace bop2nd::runtime {
namespace {

constexpr size_t kLine = 64;

// Whether the axes, named from the nearest on, lie without gaps.
bool without_gaps(const Tensor& t, const std::vector<size_t>& nearest_first) {
  int64_t expected = 1;
  for (size_t axis : nearest_first) {
    if (t.shape[axis] != 1 && t.strides[axis] != expected) return false;
    expected *= t.shape[axis];
  }
  return true;
}

// Whether strides of that shape lie without gaps in some order of the axes.
bool without_gaps(const Sizes& shape, const Sizes& strides) {
  std::vector<size_t> axes(shape.size());
  std::iota(axes.begin(), axes.end(), size_t{0});
  std::sort(axes.begin(), axes.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  // An axis of one element may have any stride.
  axes.erase(std::remove_if(axes.begin(), axes.end(), [&](size_t a) { return shape[a] == 1; }), axes.end());
  return without_gaps(Tensor{.shape = shape, .strides = strides}, axes);
}

const float* memory_of_constant(const Graph& graph, const Argument& reference) {
  return static_cast<const float*>(graph.constants[static_cast<size_t>(reference.integer)].tensor.data);
}

}  // namespace

Sizes row_major_strides(const Sizes& shape) {
  Sizes strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, shape[i]);
  return strides;
}

Sizes channels_last_strides(const Sizes& shape) {
  return {shape[1] * shape[2] * shape[3], 1, shape[1] * shape[3], shape[1]};
}

Tensor fixed_tensor(const Stored& stored) {
  Tensor tensor{.type = stored.type, .shape = stored.shape, .strides = row_major_strides(stored.shape)};
  tensor.place.fixed = stored.data;
  return tensor;
}

int64_t Tensor::count() const { return product(shape); }

bool Tensor::row_major() const {
  std::vector<size_t> axes;
  for (size_t i = rank(); i-- > 0;) axes.push_back(i);
  return without_gaps(*this, axes);
}

bool Tensor::channels_last() const { return rank() == 4 && without_gaps(*this, {1, 3, 2, 0}); }

bool Tensor::lies(const Sizes& wanted) const {
  for (size_t i = 0; i < rank(); ++i) {
    if (shape[i] != 1 && strides[i] != wanted[i]) return false;
  }
  return true;
}

Value Value::of(Tensor tensor) {
  Value value;
  value.kind = Kind::kTensor, value.tensor = std::move(tensor);
  return value;
}

Value Value::of(int64_t integer) {
  Value value;
  value.kind = Kind::kInteger, value.integer = integer;
  return value;
}

Value Value::of(double real) {
  Value value;
  value.kind = Kind::kReal, value.real = real;
  return value;
}

// ---------------------------------------------------------------------------------------------- a plan

bool Plan::fits(const std::vector<Array>& inputs, const Sizes* strides) const {
  if (inputs.size() != input_shapes.size() || (strides != nullptr) != outputs_elsewhere_) return false;
  if (strides && *strides != output_strides_) return false;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].shape != input_shapes[i] || inputs[i].strides != input_strides[i]) return false;
  }
  return true;
}

const std::vector<Array>& Plan::run(uint8_t* arena, const std::vector<Array>& inputs,
                                    const Allocate* allocate, std::vector<StepTime>* times) {
  for (size_t i = 0; i < offsets.size(); ++i) buffers_[i] = arena + offsets[i];
  if (allocate) {
    (*allocate)(results_, places_.data());
    for (size_t i = 0; i < results_.size(); ++i)
      buffers_[output_tensors_[i].place.index] = static_cast<uint8_t*>(places_[i]);
  }
  Memory memory{buffers_.data(), inputs.data()};
  for (const Operation& operation : operations) {
    if (!times) {
      operation.run(memory);
      continue;
    }
    auto start = std::chrono::steady_clock::now();
    operation.run(memory);
    std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    times->push_back({.name = operation.name,
                      .kind = operation.kind,
                      .seconds = took.count(),
                      .products = operation.products});
  }
  for (size_t i = 0; i < results_.size(); ++i) {
    if (results_[i].type != Type::kI64) results_[i].data = memory.at<uint8_t>(output_tensors_[i]);
  }
  return results_;
}

// ---------------------------------------------------------------------------------------------- planning

Planner::Planner(const Network& network, const std::vector<Array>& inputs, const Sizes* strides)
    : network_(network), plan_(std::make_unique<Plan>()), strides_(strides) {
  if (strides) plan_->output_strides_ = *strides, plan_->outputs_elsewhere_ = true;
  const Limits& limits = network.limits();
  allowed_ = limits.run_bytes;
  for (const Array& input : inputs) {
    uint64_t bytes = limits.bytes_per_input_byte * static_cast<uint64_t>(bytes_of(input.type)) *
                     static_cast<uint64_t>(product(input.shape));
    allowed_ = allowed_ + bytes < allowed_ ? UINT64_MAX : allowed_ + bytes;
    plan_->input_shapes.push_back(input.shape), plan_->input_strides.push_back(input.strides);
  }
}

void Planner::refuse(const std::string& what) const {
  fail(Status::kArgument, "step '", printable(name_), "' (", kind_, "): ", what);
}

std::unique_ptr<Plan> Planner::plan() {
  const Graph& graph = network_.graph();
  for (const Constant& constant : graph.constants) {
    values_.push_back(Value::of(fixed_tensor(constant.tensor)));
  }
  size_t n_inputs = 0;
  bool as_torch = network_.is_part();  // whose batch norms no epilogue rounds alike
  std::vector<Tail> tails = as_torch ? std::vector<Tail>(graph.steps.size()) : tails_of(graph);
  for (size_t at = 0; at < graph.steps.size(); ++at) {
    const Step& step = graph.steps[at];
    name_ = step.name.c_str();
    if (step.kind == Step::Kind::kInput) {
      kind_ = "input";
      size_t i = n_inputs++;
      Tensor tensor{
          .type = graph.inputs[i].type, .shape = plan_->input_shapes[i], .strides = plan_->input_strides[i]};
      if (tensor.strides.empty()) tensor.strides = row_major_strides(tensor.shape);
      tensor.place.kind = Place::Kind::kInput, tensor.place.index = i;
      values_.push_back(Value::of(std::move(tensor)));
    } else {
      values_.push_back(plan_step(step, tails[at]));
    }
  }
  name_ = kind_ = "output";
  collect(value(graph.output), "", 0);
  size_t n_strides = 0;
  for (const Tensor& tensor : plan_->output_tensors_) n_strides += tensor.rank();
  check(!strides_ || n_strides == strides_->size(), "other strides than the outputs have axes");
  place_buffers();
  return std::move(plan_);
}

Value Planner::plan_step(const Step& step, const Tail& tail) {
  const Graph& graph = network_.graph();
  if (tail.part_of) {
    size_t product = static_cast<size_t>(tail.part_of - graph.steps.data());
    return values_[graph.constants.size() + product];
  }
  if (step.kind == Step::Kind::kOperator) {
    kind_ = step.op->name;
    return step.op->plan(*this, step);
  }
  const Layer& layer = graph.layers[step.layer];
  kind_ = layer.kind_name;
  if (!tail.norm) return plan_layer(*this, layer, step);
  const std::vector<Argument>& norm = tail.norm->arguments;
  std::array<NormRow, 4> rows{};
  for (size_t i = 0; i < 4; ++i) {
    if (norm[i + 1].is(Argument::Kind::kReference)) rows[i] = {memory_of_constant(graph, norm[i + 1]), 1};
  }
  int64_t n = layer.weight_shape[0];
  std::vector<float> numbers(static_cast<size_t>(2 * n));
  affine_of_norm(norms(), rows, norm[7].real, n, numbers.data(), numbers.data() + n);
  const float* scale = keep(std::move(numbers));
  return plan_layer(*this, with_tail(layer, tail, scale, scale + n), step);
}

const float* Planner::keep(std::vector<float> numbers) {
  plan_->numbers_.push_back(std::move(numbers));
  return plan_->numbers_.back().data();
}

// A tensor with a buffer of its own, and the strides that are asked for.
Tensor Planner::as_output(const Tensor& tensor) {
  Sizes wanted = row_major_strides(tensor.shape);
  if (strides_) {
    size_t first = 0;
    for (const Tensor& before : plan_->output_tensors_) first += before.rank();
    check(strides_->size() >= first + tensor.rank(), "other strides than the outputs have axes");
    auto at = strides_->begin() + static_cast<std::ptrdiff_t>(first);
    wanted.assign(at, at + static_cast<std::ptrdiff_t>(tensor.rank()));
    check(tensor.count() == 0 || without_gaps(tensor.shape, wanted), "an output has strides with gaps");
  }
  bool own = tensor.place.kind == Place::Kind::kArena && !buffers_[tensor.place.index].is_output;
  Tensor to = own && tensor.offset == 0 && tensor.lies(wanted) ? tensor : copy(tensor, wanted);
  to.strides = std::move(wanted);
  buffers_[to.place.index].is_output = true;
  return to;
}

// Tensors and sizes of the result in order.
void Planner::collect(const Value& value, const std::string& name, int depth) {
  check(depth <= 64 && plan_->outputs.size() < 4096, "the result is nested too deeply or has too many parts");
  if (value.kind == Value::Kind::kList) {
    for (size_t i = 0; i < value.items.size(); ++i) {
      std::string key = value.keys.empty() ? std::to_string(i) : value.keys[i];
      collect(value.items[i], name.empty() ? key : name + "." + key, depth + 1);
    }
    return;
  }
  bool is_tensor = value.kind == Value::Kind::kTensor;
  if (!is_tensor && !(value.kind == Value::Kind::kInteger && value.real != 0)) return;
  Tensor tensor;
  if (is_tensor) tensor = as_output(value.tensor);
  check(is_tensor || !strides_, "a part gives a size");
  plan_->output_integers_.push_back(value.integer);
  plan_->output_tensors_.push_back(tensor);
  Type type = is_tensor ? tensor.type : Type::kI64;
  plan_->outputs.push_back({.name = name.empty() ? "output" : name, .type = type, .shape = tensor.shape});
}

// Best fit among what is free, in the order in which buffers come into use.
void Planner::place_buffers() {
  plan_->offsets.assign(buffers_.size(), 0);
  size_t n_operations = plan_->operations.size();
  for (Buffer& buffer : buffers_) {
    if (buffer.is_output) buffer.last = n_operations;
  }
  std::vector<std::vector<size_t>> ends(n_operations + 1);
  std::multimap<size_t, size_t> by_size;  // free: bytes -> offset
  std::map<size_t, size_t> by_offset;     // free: offset -> bytes
  auto forget = [&](std::map<size_t, size_t>::iterator at) {
    for (auto [a, b] = by_size.equal_range(at->second); a != b; ++a) {
      if (a->second == at->first) {
        by_size.erase(a);
        break;
      }
    }
    by_offset.erase(at);
  };
  auto release = [&](size_t offset, size_t bytes) {
    auto after = by_offset.lower_bound(offset);
    if (after != by_offset.end() && after->first == offset + bytes) bytes += after->second, forget(after);
    after = by_offset.lower_bound(offset);
    if (after != by_offset.begin()) {
      auto before = std::prev(after);
      if (before->first + before->second == offset)
        offset = before->first, bytes += before->second, forget(before);
    }
    by_offset.emplace(offset, bytes), by_size.emplace(bytes, offset);
  };
  size_t next = 0, top = 0;
  for (size_t operation = 0; operation < n_operations; ++operation) {
    for (; next < buffers_.size() && buffers_[next].first <= operation; ++next) {
      Buffer& buffer = buffers_[next];
      if (buffer.is_output && strides_) continue;  // it lies elsewhere
      auto found = by_size.lower_bound(buffer.bytes);
      size_t at = top;
      if (found != by_size.end()) {
        at = found->second;
        size_t left = found->first - buffer.bytes;
        by_offset.erase(at), by_size.erase(found);
        if (left > 0) by_offset.emplace(at + buffer.bytes, left), by_size.emplace(left, at + buffer.bytes);
      } else {
        top += buffer.bytes;
      }
      plan_->offsets[next] = at;
      ends[std::max(operation, std::min(buffer.last, n_operations))].push_back(next);
    }
    for (size_t i : ends[operation]) release(plan_->offsets[i], buffers_[i].bytes);
    if (top > allowed_)
      fail(Status::kLimit, "step '", printable(plan_->operations[operation].name),
           "' would bring the memory of this run to ", top, " bytes, ", allowed_, " are allowed");
  }
  plan_->arena_bytes = top;
  plan_->buffers_.resize(buffers_.size());
  plan_->results_.resize(plan_->outputs.size());
  plan_->places_.resize(plan_->outputs.size());
  for (size_t i = 0; i < plan_->results_.size(); ++i) {
    Array& result = plan_->results_[i];
    result.type = plan_->outputs[i].type, result.shape = plan_->outputs[i].shape;
    if (strides_) result.strides = plan_->output_tensors_[i].strides;
    if (result.type == Type::kI64) result.data = &plan_->output_integers_[i];
  }
}

Tensor Planner::make(Type type, Sizes shape, bool channels_last) {
  Sizes strides = channels_last ? channels_last_strides(shape) : row_major_strides(shape);
  return make(type, std::move(shape), std::move(strides));
}

Tensor Planner::make(Type type, Sizes shape, Sizes strides) {
  int64_t n_bytes = extent(shape) * bytes_of(type);
  if (n_bytes < 0 || static_cast<uint64_t>(n_bytes) > allowed_)
    fail(Status::kLimit, "step '", printable(name_), "' would make a tensor of more than the ", allowed_,
         " bytes that are allowed");
  Tensor tensor{.type = type, .shape = std::move(shape), .strides = std::move(strides)};
  tensor.place.kind = Place::Kind::kArena, tensor.place.index = buffers_.size();
  size_t bytes = (static_cast<size_t>(n_bytes) + kLine - 1) / kLine * kLine;
  size_t now = plan_->operations.size();
  buffers_.push_back({.bytes = bytes + kLine, .first = now, .last = now, .is_output = false});
  return tensor;
}

void Planner::emit(std::vector<Tensor> reads, std::vector<Tensor> writes, double products,
                   std::function<void(const Memory&)> run) {
  double work = products;
  for (auto* tensors : {&reads, &writes}) {
    for (const Tensor& tensor : *tensors) {
      if (tensor.place.kind != Place::Kind::kArena) continue;
      buffers_[tensor.place.index].last = plan_->operations.size();
      if (tensors == &writes) work += static_cast<double>(tensor.count());
    }
  }
  products_ += work;
  if (products_ > static_cast<double>(network_.limits().run_products))
    fail(Status::kLimit, "step '", printable(name_), "' would bring the work of this run above the ",
         network_.limits().run_products, " operations that are allowed");
  plan_->operations.push_back({.name = name_, .kind = kind_, .products = products, .run = std::move(run)});
}

Tensor Planner::copy(const Tensor& from, Sizes strides) {
  Tensor to = make(from.type, from.shape, std::move(strides));
  Walk walk(to, {&from, nullptr, nullptr});
  emit({from}, {to}, 0, [=](const Memory& memory) { copy_elements(memory, walk, from, to); });
  return to;
}

Tensor Planner::dense(const Tensor& from) {
  return from.row_major() ? from : copy(from, row_major_strides(from.shape));
}

Tensor Planner::nearest_channels(const Tensor& from) {
  return from.channels_last() ? from : copy(from, channels_last_strides(from.shape));
}

// --------------------------------------------------------------------------------------------- arguments

Value Planner::value(const Argument& argument) const {
  using Kind = Argument::Kind;
  if (argument.is(Kind::kReference)) {
    Value found = values_[static_cast<size_t>(argument.integer)];
    if (found.kind == Value::Kind::kInteger) found.real = 1;  // a computed size, of which a result tells
    return found;
  }
  Value value;
  value.integer = argument.integer, value.real = argument.is(Kind::kReal) ? argument.real : 0;
  value.text = argument.text;
  switch (argument.kind) {
    case Kind::kBool:
      value.kind = Value::Kind::kBool;
      break;
    case Kind::kInteger:
      value.kind = Value::Kind::kInteger;
      break;
    case Kind::kReal:
      value.kind = Value::Kind::kReal;
      break;
    case Kind::kList:
    case Kind::kTuple:
      value.kind = Value::Kind::kList;
      for (const Argument& item : argument.items) value.items.push_back(this->value(item));
      break;
    case Kind::kDict:
      value.kind = Value::Kind::kList;
      for (size_t i = 0; i + 1 < argument.items.size(); i += 2) {
        const Argument& key = argument.items[i];
        value.keys.push_back(key.is(Kind::kText) ? key.text : std::to_string(key.integer));
        value.items.push_back(this->value(argument.items[i + 1]));
      }
      break;
    default:
      value.kind = argument.is(Kind::kNull) ? Value::Kind::kNull : Value::Kind::kText;
  }
  return value;
}

Tensor Planner::tensor(const Argument& argument) const {
  Value found = value(argument);
  check(found.kind == Value::Kind::kTensor, "an operand is no tensor");
  return found.tensor;
}

Tensor Planner::tensor(const Argument& argument, Type type) const {
  Tensor found = tensor(argument);
  if (found.type != type)
    refuse(std::string("an operand is ") + name_of(found.type) + ", not " + name_of(type));
  return found;
}

int64_t Planner::integer(const Argument& argument) const {
  Value found = value(argument);
  check(found.kind == Value::Kind::kInteger, "an argument is no integer");
  return found.integer;
}

bool Planner::is_number(const Argument& argument) const {
  Value found = value(argument);
  return found.kind == Value::Kind::kInteger || found.kind == Value::Kind::kReal;
}

double Planner::number(const Argument& argument) const {
  Value found = value(argument);
  check(found.kind == Value::Kind::kInteger || found.kind == Value::Kind::kReal, "an argument is no number");
  return found.kind == Value::Kind::kInteger ? static_cast<double>(found.integer) : found.real;
}

bool Planner::truth(const Argument& argument) const {
  Value found = value(argument);
  check(found.kind == Value::Kind::kBool, "an argument is neither true nor false");
  return found.integer != 0;
}

Sizes Planner::integers(const Argument& argument) const {
  Value found = value(argument);
  if (found.kind == Value::Kind::kInteger) return {found.integer};
  check(found.kind == Value::Kind::kList, "an argument is no list of integers");
  Sizes sizes;
  for (const Value& item : found.items) {
    check(item.kind == Value::Kind::kInteger, "an argument is no list of integers");
    sizes.push_back(item.integer);
  }
  return sizes;
}

Pair Planner::pair(const Argument& argument, int64_t least) const {
  Sizes sizes = integers(argument);
  check(sizes.size() == 1 || sizes.size() == 2, "an argument is no pair of integers");
  for (int64_t size : sizes) check(size >= least && size < (int64_t{1} << 31), "a size is out of range");
  return {{sizes[0], sizes.back()}};
}

}  // namespace bop2nd::runtime
