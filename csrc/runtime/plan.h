// SPDX-License-Identifier: Apache-2.0
// From a graph and the sizes of its inputs to operations on planned memory: all sizes are known before
// anything runs, so every result gets its place in one arena, which it shares with results of other times.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/parallel.h"
#include "aligned.h"
#include "error.h"
#include "network.h"

namespace bop2nd::runtime {

// Of the instruction set in use.
inline const RealTable& real_table() { return *active_table().reals; }

struct Place {
  enum class Kind : uint8_t { kArena, kInput, kFixed } kind = Kind::kFixed;
  size_t index = 0;  // of the buffer or input
  const void* fixed = nullptr;
};

// Strides in elements, 0 where an axis is expanded.
struct Tensor {
  Type type = Type::kF32;
  Sizes shape{}, strides{};
  Place place{};
  int64_t offset = 0;  // in elements

  size_t rank() const { return shape.size(); }
  int64_t count() const;
  bool is_fixed() const { return place.kind == Place::Kind::kFixed; }
  // In the order of its axes, the last one nearest, without gaps.
  bool row_major() const;
  // [N, C, H, W] with C nearest, without gaps.
  bool channels_last() const;
  // Whether these strides name the same places.
  bool lies(const Sizes& strides) const;
};
Sizes row_major_strides(const Sizes& shape);
Sizes channels_last_strides(const Sizes& shape);
Tensor fixed_tensor(const Stored& stored);

// What a step makes: a tensor, a number, or several values.
struct Value {
  enum class Kind : uint8_t { kNull, kBool, kInteger, kReal, kText, kTensor, kList } kind = Kind::kNull;
  int64_t integer = 0;
  double real = 0;
  std::string text;
  Tensor tensor;
  std::vector<Value> items;
  std::vector<std::string> keys;  // of items out of a dict

  static Value of(Tensor tensor);
  static Value of(int64_t integer);
  static Value of(double real);
};

// Where everything is while a plan runs.
struct Memory {
  uint8_t* const* buffers;
  const Array* inputs;

  template <class T = float>
  T* at(const Tensor& tensor) const {
    const Place& place = tensor.place;
    const void* base = place.kind == Place::Kind::kArena   ? buffers[place.index]
                       : place.kind == Place::Kind::kInput ? inputs[place.index].data
                                                           : place.fixed;
    return const_cast<T*>(static_cast<const T*>(base)) + tensor.offset;
  }
};

struct Operation {
  const char *name, *kind;
  double products;
  std::function<void(const Memory&)> run;
};

// Planned for some sizes of the inputs.
class Plan {
 public:
  std::vector<Operation> operations;
  std::vector<size_t> offsets;
  size_t arena_bytes = 0;
  std::vector<OutputSpec> outputs;
  std::vector<Sizes> input_shapes, input_strides;

  bool fits(const std::vector<Array>& inputs, const Sizes* strides) const;
  // `allocate` if the plan was made for given strides: the outputs do not lie in the arena then.
  const std::vector<Array>& run(uint8_t* arena, const std::vector<Array>& inputs, const Allocate* allocate,
                                std::vector<StepTime>* times);

 private:
  friend class Planner;
  std::vector<std::vector<float>> numbers_;  // that planning made
  std::vector<Tensor> output_tensors_;
  std::vector<int64_t> output_integers_;
  std::vector<Array> results_;
  bool outputs_elsewhere_ = false;
  Sizes output_strides_;  // as asked for
  std::vector<uint8_t*> buffers_;
  std::vector<void*> places_;  // of the outputs
};

// What of a step's readers becomes a part of it, or what it is itself a part of.
struct Tail {
  const Step* norm = nullptr;
  bool signs = false;
  const Step* part_of = nullptr;
};
std::vector<Tail> tails_of(const Graph& graph);  // of every step
// The product with the batch norm `x * scale + shift`, and signs if the tail has them, as its epilogue.
Layer with_tail(const Layer& product, const Tail& tail, const float* scale, const float* shift);

class Planner {
 public:
  // `strides` of all outputs, one after the other; null: all row-major.
  Planner(const Network& network, const std::vector<Array>& inputs, const Sizes* strides);
  std::unique_ptr<Plan> plan();

  // ---- Arguments of the step at hand, by position; `fail` where they are of another kind.
  Value value(const Argument& argument) const;
  Tensor tensor(const Argument& argument) const;  // of any type
  Tensor tensor(const Argument& argument, Type type) const;
  Tensor real(const Argument& argument) const { return tensor(argument, Type::kF32); }
  Tensor words(const Argument& argument) const { return tensor(argument, Type::kI32); }
  int64_t integer(const Argument& argument) const;
  double number(const Argument& argument) const;
  bool is_number(const Argument& argument) const;
  Sizes integers(const Argument& argument) const;
  Pair pair(const Argument& argument, int64_t least) const;  // one number stands for two
  bool truth(const Argument& argument) const;

  // ---- Results
  Tensor make(Type type, Sizes shape, bool channels_last = false);
  Tensor make(Type type, Sizes shape, Sizes strides);
  // What computes `writes` from `reads`. `products` count against the limit.
  void emit(std::vector<Tensor> reads, std::vector<Tensor> writes, double products,
            std::function<void(const Memory&)> run);
  // The same values, if need be copied: rows without gaps, or [N, C, H, W] with C nearest.
  Tensor dense(const Tensor& tensor);
  Tensor nearest_channels(const Tensor& tensor);

  // Numbers that live as long as the plan.
  const float* keep(std::vector<float> numbers);

  Prepared& prepared() const { return network_.prepared(); }
  NormRounding norms() const { return network_.norms(); }
  [[noreturn]] void refuse(const std::string& what) const;
  void check(bool kept, const char* what) const {
    if (!kept) refuse(what);
  }

 private:
  const Network& network_;
  std::unique_ptr<Plan> plan_;
  std::vector<Value> values_;
  struct Buffer {
    size_t bytes, first, last;
    bool is_output;
  };
  std::vector<Buffer> buffers_;
  const char *name_ = "", *kind_ = "";
  uint64_t allowed_ = 0;
  double products_ = 0;

  const Sizes* strides_;

  Value plan_step(const Step& step, const Tail& tail);
  Tensor copy(const Tensor& from, Sizes strides);
  void collect(const Value& value, const std::string& name, int depth);
  Tensor as_output(const Tensor& tensor);
  void place_buffers();
};

Value plan_layer(Planner& planner, const Layer& layer, const Step& step);

constexpr const char* kBatchNorm = "aten.batch_norm.default";
// Weight, bias, mean and variance of n channels, each with its stride; the first two may be missing (null):
// x * scale + shift.
struct NormRow {
  const float* at;
  int64_t stride;
};
void affine_of_norm(NormRounding rounding, const std::array<NormRow, 4>& rows, double eps, int64_t n,
                    float* scale, float* shift);

// Plans list where the numbers of one result lie: at most this many.
constexpr int64_t kMaxSummands = int64_t{1} << 24;

// ---- Products and windows, which layers and operators share.
struct Geometry {
  Pair kernel, stride, padding, dilation;
  int64_t groups = 1;
  bool ceil_mode = false;
};
int64_t window_outputs(const Planner& planner, const Geometry& g, int axis, int64_t size);
enum class Reduction { kMax, kMean };
struct MeanOptions {
  bool count_padding = true;
  int64_t divisor = 0;  // 0: the taps
};
Tensor plan_windows(Planner& planner, const Tensor& x, const Geometry& g, Reduction reduction,
                    const MeanOptions& options);

// Real weights [O, C / groups, kH, kW], from a tensor or from words.
struct RealWeight {
  Tensor tensor;
  const uint32_t* words = nullptr;
  Sizes shape;
};
Tensor plan_real_conv(Planner& planner, const Tensor& x, const RealWeight& weight, const Tensor* bias,
                      const Geometry& g);
Tensor plan_real_linear(Planner& planner, const Tensor& x, const RealWeight& weight, const Tensor* bias);

// ---- Walks
// Axes of a result and how up to three operands walk along, nearest last, merged where possible.
struct Walk {
  static constexpr int kOperands = 4;  // the result first
  Sizes sizes;
  std::vector<std::array<int64_t, kOperands>> strides;
  int64_t inner = 1, outer = 1;
  std::array<int64_t, kOperands> inner_strides{};

  // Operands broadcast to the result's shape; null ones are left out.
  Walk(const Tensor& to, std::array<const Tensor*, kOperands - 1> from);
  // body(offsets of result and operands) for every run of `inner` elements; shared among threads.
  template <class Body>
  void run(const Body& body) const {
    parallel_ranges(outer, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, inner)),
                    [&](int64_t begin, int64_t end) {
                      for (int64_t i = begin; i < end; ++i) {
                        std::array<int64_t, kOperands> at{};
                        int64_t rest = i;
                        for (size_t axis = sizes.size(); axis-- > 0;) {
                          int64_t index = rest % sizes[axis];
                          rest /= sizes[axis];
                          for (size_t k = 0; k < kOperands; ++k) at[k] += index * strides[axis][k];
                        }
                        body(at);
                      }
                    });
  }
};
void copy_elements(const Memory& memory, const Walk& walk, const Tensor& from, const Tensor& to);
Sizes broadcast(const Planner& planner, const Sizes& a, const Sizes& b);

}  // namespace bop2nd::runtime
