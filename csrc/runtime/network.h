// SPDX-License-Identifier: Apache-2.0
// A loaded network and what runs it. Errors are thrown (error.h).
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
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
  Sizes shape, strides;
  const void* data = nullptr;
};

// An array of the result: its place in it ("logits", "pair.1") and what a run on the example's sizes gives.
struct OutputSpec {
  std::string name;
  Type type;
  Sizes shape;
};

// Does not change.
class Network {
 public:
  static std::shared_ptr<const Network> from_file(const char* path, const Limits& limits);
  static std::shared_ptr<const Network> from_memory(const void* bytes, size_t n, const Limits& limits);

  const Graph& graph() const { return graph_; }
  const Limits& limits() const { return limits_; }
  const std::vector<OutputSpec>& outputs() const { return outputs_; }
  std::string describe() const;
  Prepared& prepared() const { return prepared_; }

 private:
  Network(std::unique_ptr<MappedFile> file, const void* bytes, size_t n, const Limits& limits);

  std::unique_ptr<MappedFile> file_;
  std::vector<std::vector<uint64_t>> copies_;
  Limits limits_;
  Graph graph_;
  std::vector<OutputSpec> outputs_;
  mutable Prepared prepared_;

  void look_at_outputs();
};

struct StepTime {
  const char *name, *kind;
  double seconds, products;
};

// Runs a network, one call at a time.
class Context {
 public:
  Context(std::shared_ptr<const Network> network, int n_threads);
  ~Context();

  // The outputs' data is valid until the next call. With `times`, measures every operation.
  const std::vector<Array>& run(const std::vector<Array>& inputs, std::vector<StepTime>* times = nullptr);

 private:
  std::shared_ptr<const Network> network_;
  WorkerPool pool_;
  std::vector<std::unique_ptr<Plan>> plans_;  // of the last sets of input shapes, the latest first

  Plan& plan_for(const std::vector<Array>& inputs);
};

}  // namespace bop2nd::runtime
