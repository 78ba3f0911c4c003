// SPDX-License-Identifier: Apache-2.0
// A loaded network and what runs it. Errors are thrown (error.h).
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "aligned.h"
#include "graph.h"
#include "thread_pool.h"

namespace bop2nd::runtime {

class Plan;

struct Limits {
  uint64_t file_bytes = uint64_t{1} << 32;
  uint64_t run_bytes = uint64_t{1} << 30;
  uint64_t bytes_per_input_byte = 4096;  // besides run_bytes
  uint64_t run_products = uint64_t{1} << 50;
};

// What a caller gives and gets. Strides in elements; empty: row-major.
struct Array {
  Type type = Type::kF32;
  Sizes shape{}, strides{};
  const void* data = nullptr;
};

// An array of the result: its place in it ("logits", "pair.1") and what a run on the example's sizes gives.
struct OutputSpec {
  std::string name;
  Type type;
  Sizes shape;
};

// For networks that somebody else has let into memory.
inline Limits no_limits() {
  return {.file_bytes = UINT64_MAX,
          .run_bytes = UINT64_MAX,
          .bytes_per_input_byte = 0,
          .run_products = UINT64_MAX};
}

// How batch norm is rounded. Networks from files: scale and shift from doubles, then two roundings. Parts:
// as torch does it here, all in floats, fused multiply-adds where it was built with them.
enum class NormRounding : uint8_t { kOwn, kTorch, kTorchFused };

// Does not change.
class Network {
 public:
  static std::shared_ptr<const Network> from_file(const char* path, const Limits& limits);
  static std::shared_ptr<const Network> from_memory(const void* bytes, size_t n, const Limits& limits);
  // A part of a network over tensors that the caller keeps: inputs have any shapes, nothing is limited.
  // Their numbers may change between calls, their places not.
  static std::shared_ptr<const Network> part(std::string_view graph, StoredTensors tensors,
                                             NormRounding norms);

  const Graph& graph() const { return graph_; }
  bool is_part() const { return norms_ != NormRounding::kOwn; }
  NormRounding norms() const { return norms_; }
  const Limits& limits() const { return limits_; }
  const std::vector<OutputSpec>& outputs() const { return outputs_; }
  std::string describe() const;
  Prepared& prepared() const { return prepared_; }

 private:
  Network() = default;
  Network(std::unique_ptr<MappedFile> file, const void* bytes, size_t n, const Limits& limits);

  std::unique_ptr<MappedFile> file_;
  std::vector<std::vector<uint64_t>> copies_;
  Limits limits_;
  NormRounding norms_ = NormRounding::kOwn;
  Graph graph_;
  std::vector<OutputSpec> outputs_;
  mutable Prepared prepared_;

  void look_at_outputs();
};

struct StepTime {
  const char *name, *kind;
  double seconds, products;
};

// Memory for the outputs, whose shapes and strides are known: the place of each goes to `places`.
using Allocate = std::function<void(const std::vector<Array>& outputs, void** places)>;

// Runs a network, one call at a time. With 0 threads on the pool that csrc/cpu has installed.
class Context {
 public:
  Context(std::shared_ptr<const Network> network, int n_threads);
  ~Context();

  // The outputs' data is valid until the next call. With `times`, measures every operation.
  const std::vector<Array>& run(const std::vector<Array>& inputs, std::vector<StepTime>* times = nullptr);
  // Outputs are written where the caller wants them, with these strides (of all outputs, one after the
  // other).
  void run_into(const std::vector<Array>& inputs, const Sizes& strides, const Allocate& allocate);

 private:
  std::shared_ptr<const Network> network_;
  std::unique_ptr<WorkerPool> pool_;
  std::vector<std::unique_ptr<Plan>> plans_;  // of the last sets of input shapes, the latest first
  Aligned<uint8_t> arena_;                    // of whatever plan runs

  Plan& plan_for(const std::vector<Array>& inputs, const Sizes* strides);
};

}  // namespace bop2nd::runtime
