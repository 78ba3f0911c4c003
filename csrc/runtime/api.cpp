// SPDX-License-Identifier: Apache-2.0
// include/bop2nd_runtime.h: from C to the runtime's classes, from exceptions to a status.
#include "../../include/bop2nd_runtime.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <new>

#include "../cpu/dispatch.h"
#include "error.h"
#include "network.h"

using bop2nd::runtime::Array;
using bop2nd::runtime::Context;
using bop2nd::runtime::Error;
using bop2nd::runtime::fail;
using bop2nd::runtime::Network;
using bop2nd::runtime::Sizes;
using bop2nd::runtime::Status;
using bop2nd::runtime::Type;

struct bop2nd_network {
  std::shared_ptr<const Network> network;
};

struct bop2nd_context {
  Context context;
  int32_t n_outputs;
  std::vector<Array> inputs;
  std::vector<bop2nd::runtime::StepTime> times;
};

namespace {

constexpr const char* kVersion = BOP2ND_VERSION;
static_assert(BOP2ND_MAX_AXES == bop2nd::runtime::kMaxAxes, "results must fit bop2nd_tensor");
static_assert(BOP2ND_ERROR_MEMORY == static_cast<int>(Status::kMemory), "the numbers of the status");

// Not a std::string: what is said must not need memory.
thread_local char last_error[512];

bop2nd_status failed(Status status, const char* text) {
  std::strncpy(last_error, text, sizeof last_error - 1);
  return static_cast<bop2nd_status>(status);
}

template <class Body>
bop2nd_status guarded(const Body& body) {
  try {
    body();
    return BOP2ND_OK;
  } catch (const Error& error) {
    return failed(error.status, error.what());
  } catch (const std::bad_alloc&) {
    return failed(Status::kMemory, "no memory is left");
  } catch (const std::exception& error) {  // of the loops, about sizes; of the library, about lengths
    return failed(Status::kArgument, error.what());
  }
}

void check_argument(bool kept, const char* what) {
  if (!kept) fail(Status::kArgument, what);
}

bop2nd::runtime::Limits limits_of(const bop2nd_limits* given) {
  bop2nd::runtime::Limits limits;
  if (!given) return limits;
  if (given->file_bytes) limits.file_bytes = given->file_bytes;
  if (given->run_bytes) limits.run_bytes = given->run_bytes, limits.bytes_per_input_byte = 0;
  if (given->run_products) limits.run_products = given->run_products;
  return limits;
}

// In the order of bop2nd_dtype.
constexpr Type kTypes[] = {Type::kF32, Type::kI32, Type::kI64, Type::kI8, Type::kU8};

bop2nd_dtype dtype_of(Type type) {
  return static_cast<bop2nd_dtype>(std::find(std::begin(kTypes), std::end(kTypes), type) - kTypes);
}

template <class To>
void write_shape(const Sizes& shape, To* to) {
  to->n_axes = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), to->shape);
}

void read_inputs(const bop2nd_tensor* inputs, int32_t n_inputs, std::vector<Array>& to) {
  check_argument(n_inputs >= 0 && (inputs || n_inputs == 0), "inputs are missing");
  to.resize(static_cast<size_t>(n_inputs));
  for (size_t i = 0; i < to.size(); ++i) {
    const bop2nd_tensor& given = inputs[i];
    check_argument(given.n_axes >= 0 && given.n_axes <= BOP2ND_MAX_AXES, "an input has more than 16 axes");
    check_argument(given.dtype >= BOP2ND_FLOAT32 && given.dtype <= BOP2ND_UINT8, "an input of unknown dtype");
    to[i].type = kTypes[given.dtype];
    to[i].shape.assign(given.shape, given.shape + given.n_axes);
    to[i].strides.clear();
    if (given.strides) to[i].strides.assign(given.strides, given.strides + given.n_axes);
    to[i].data = given.data;
  }
}

template <class Make>
bop2nd_status load(bop2nd_network** network, const Make& make) {
  return guarded([&] {
    check_argument(network, "the place for the network is missing");
    *network = new bop2nd_network{make()};
  });
}

}  // namespace

const char* bop2nd_version(void) { return kVersion; }

const char* bop2nd_instruction_set(void) { return bop2nd_isa_name(bop2nd_isa_active()); }

const char* bop2nd_last_error(void) { return last_error; }

bop2nd_status bop2nd_load_file(const char* path, const bop2nd_limits* limits, bop2nd_network** network) {
  return load(network, [&] {
    check_argument(path, "the path is missing");
    return Network::from_file(path, limits_of(limits));
  });
}

bop2nd_status bop2nd_load_memory(const void* bytes, size_t n_bytes, const bop2nd_limits* limits,
                                 bop2nd_network** network) {
  return load(network, [&] {
    check_argument(bytes || n_bytes == 0, "the bytes are missing");
    return Network::from_memory(bytes, n_bytes, limits_of(limits));
  });
}

void bop2nd_free(bop2nd_network* network) { delete network; }

int32_t bop2nd_n_inputs(const bop2nd_network* network) {
  return network ? static_cast<int32_t>(network->network->graph().inputs.size()) : 0;
}

bop2nd_status bop2nd_input_info(const bop2nd_network* network, int32_t i, bop2nd_tensor_info* info) {
  return guarded([&] {
    check_argument(network && info && i >= 0 && i < bop2nd_n_inputs(network), "there is no such input");
    const bop2nd::runtime::InputSpec& input = network->network->graph().inputs[static_cast<size_t>(i)];
    *info = {};
    info->name = input.name.c_str(), info->dtype = dtype_of(input.type);
    write_shape(input.shape, info);
    for (size_t axis = 0; axis < input.free.size(); ++axis) info->free_axis[axis] = input.free[axis];
  });
}

int32_t bop2nd_n_outputs(const bop2nd_network* network) {
  return network ? static_cast<int32_t>(network->network->outputs().size()) : 0;
}

bop2nd_status bop2nd_output_info(const bop2nd_network* network, int32_t i, bop2nd_tensor_info* info) {
  return guarded([&] {
    check_argument(network && info && i >= 0 && i < bop2nd_n_outputs(network), "there is no such output");
    const bop2nd::runtime::OutputSpec& output = network->network->outputs()[static_cast<size_t>(i)];
    *info = {};
    info->name = output.name.c_str(), info->dtype = dtype_of(output.type);
    write_shape(output.shape, info);
  });
}

size_t bop2nd_describe(const bop2nd_network* network, char* text, size_t capacity) {
  size_t n = 0;
  bop2nd_status status = guarded([&] {
    check_argument(network, "the network is missing");
    std::string whole = network->network->describe();
    n = whole.size() + 1;
    if (!text || capacity == 0) return;
    size_t written = std::min(capacity - 1, whole.size());
    std::memcpy(text, whole.data(), written);
    text[written] = 0;
  });
  return status == BOP2ND_OK ? n : 0;
}

bop2nd_status bop2nd_context_new(const bop2nd_network* network, int32_t n_threads, bop2nd_context** context) {
  return guarded([&] {
    check_argument(network && context, "the network or the place for the context is missing");
    check_argument(n_threads >= 1 && n_threads <= 1024, "a context has 1 to 1024 threads");
    *context = new bop2nd_context{{network->network, n_threads}, bop2nd_n_outputs(network), {}, {}};
  });
}

void bop2nd_context_free(bop2nd_context* context) { delete context; }

bop2nd_status bop2nd_run(bop2nd_context* context, const bop2nd_tensor* inputs, int32_t n_inputs,
                         bop2nd_tensor* outputs, int32_t n_outputs) {
  return guarded([&] {
    check_argument(context, "the context is missing");
    check_argument(n_outputs == context->n_outputs && (outputs || n_outputs == 0),
                   "another number of outputs than bop2nd_n_outputs says");
    read_inputs(inputs, n_inputs, context->inputs);
    const std::vector<Array>& results = context->context.run(context->inputs);
    for (size_t i = 0; i < results.size(); ++i) {
      bop2nd_tensor& to = outputs[i];
      to = {};
      to.data = const_cast<void*>(results[i].data), to.dtype = dtype_of(results[i].type);
      write_shape(results[i].shape, &to);
    }
  });
}

bop2nd_status bop2nd_profile(bop2nd_context* context, const bop2nd_tensor* inputs, int32_t n_inputs,
                             bop2nd_step_profile* steps, int32_t capacity, int32_t* n_steps) {
  return guarded([&] {
    check_argument(context && n_steps && capacity >= 0 && (steps || capacity == 0),
                   "the context or the place for the steps is missing");
    read_inputs(inputs, n_inputs, context->inputs);
    context->times.clear();
    context->context.run(context->inputs, &context->times);
    *n_steps = static_cast<int32_t>(context->times.size());
    for (int32_t i = 0; i < std::min(capacity, *n_steps); ++i) {
      const auto& time = context->times[static_cast<size_t>(i)];
      steps[i].name = time.name, steps[i].kind = time.kind;
      steps[i].seconds = time.seconds, steps[i].products = time.products;
    }
  });
}
