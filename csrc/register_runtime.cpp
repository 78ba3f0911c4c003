// SPDX-License-Identifier: Apache-2.0
// bop2nd::run_packed: a part of a packed model as one operator, on torch's threads and tensors. Parts are
// made and freed by plain C symbols (bop2nd_fast/inference/part.py), which keeps the memory of their
// tensors.
#include "register_tensor.h"
#include "runtime/aligned.h"
#include "runtime/error.h"
#include "runtime/network.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>

namespace {

using namespace bop2nd::binding;
namespace runtime = bop2nd::runtime;

// Where a tensor of a part lay when it was made: its addresses are in the part's plans.
struct Held {
  const void* data;
  ScalarType dtype;
  Ints shape;

  bool is(const Tensor& t) const {
    auto sizes = t.sizes();
    return t.const_data_ptr() == data && t.scalar_type() == dtype && t.is_contiguous() &&
           std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
  }
};

// Calls of several threads at a time have a context each.
struct Part {
  std::shared_ptr<const runtime::Network> network;
  std::vector<Held> held;
  std::mutex mutex;
  std::vector<std::unique_ptr<runtime::Context>> idle;

  std::unique_ptr<runtime::Context> take() {
    std::lock_guard<std::mutex> lock(mutex);
    if (idle.empty()) return std::make_unique<runtime::Context>(network, 0);
    std::unique_ptr<runtime::Context> context = std::move(idle.back());
    idle.pop_back();
    return context;
  }
  void give_back(std::unique_ptr<runtime::Context> context) {
    std::lock_guard<std::mutex> lock(mutex);
    idle.push_back(std::move(context));
  }
};

struct Parts {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<Part>> by_number;
  int64_t next = 1;
};

Parts& parts() {
  static Parts* all = new Parts;  // lives as long as the process: Python frees parts at its very end
  return *all;
}

thread_local std::string why_not;

std::shared_ptr<Part> part_of(int64_t number) {
  std::lock_guard<std::mutex> lock(parts().mutex);
  auto found = parts().by_number.find(number);
  BOP2ND_REQUIRE(found != parts().by_number.end(), "there is no part ", number, " of a packed model");
  return found->second;
}

struct SameType {
  ScalarType torch;
  runtime::Type here;
};
constexpr SameType kTypes[] = {{ScalarType::Float, runtime::Type::kF32},
                               {ScalarType::Int, runtime::Type::kI32},
                               {ScalarType::Char, runtime::Type::kI8},
                               {ScalarType::Byte, runtime::Type::kU8}};

runtime::Array array_of(const Tensor& t) {
  auto found = std::find_if(std::begin(kTypes), std::end(kTypes),
                            [&](const SameType& type) { return type.torch == t.scalar_type(); });
  BOP2ND_REQUIRE(found != std::end(kTypes), "inputs must be float32, int8, uint8 or int32 words, got ",
                 torch::headeronly::toString(t.scalar_type()));
  runtime::Array array;
  array.type = found->here;
  array.shape = sizes_of(t);
  auto strides = t.strides();
  array.strides.assign(strides.begin(), strides.end());
  array.data = t.const_data_ptr();
  return array;
}

// One that starts between two numbers is copied.
Tensor aligned(const Tensor& t) {
  bool fits = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % static_cast<uintptr_t>(t.element_size()) == 0;
  return fits ? t : torch::stable::clone(t);
}

// Nothing comes back if `held` lie elsewhere than when the part was made.
Tensors run_packed(int64_t number, const Tensors held_now, const Tensors inputs, const Ints strides) {
  BOP2ND_REQUIRE(!inputs.empty(), "a part of a packed model has at least one input");
  std::shared_ptr<Part> part = part_of(number);
  bool same = std::equal(part->held.begin(), part->held.end(), held_now.begin(), held_now.end(),
                         [](const Held& then, const Tensor& now) { return then.is(now); });
  if (!same) return {};
  std::unique_ptr<runtime::Context> context = part->take();
  Tensors held, outputs;
  std::vector<runtime::Array> arrays;
  for (const Tensor& input : inputs) {
    held.push_back(aligned(input));
    arrays.push_back(array_of(held.back()));
  }
  auto allocate = [&](const std::vector<runtime::Array>& wanted, void** places) {
    for (const runtime::Array& to : wanted) {
      auto found = std::find_if(std::begin(kTypes), std::end(kTypes),
                                [&](const SameType& type) { return type.here == to.type; });
      outputs.push_back(new_strided(inputs[0], to.shape, to.strides, found->torch));
      *places++ = outputs.back().mutable_data_ptr();
    }
  };
  try {
    context->run_into(arrays, strides, allocate);
  } catch (const runtime::Error& error) {
    refuse(error.what());
  }
  part->give_back(std::move(context));
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bop2nd, CPU, m) { m.impl("run_packed", TORCH_BOX(&run_packed)); }

struct bop2nd_part_tensor {
  const char* name;
  const void* data;
  const void* blocked;  // of a weight: what prepack_weight makes of it
  int64_t groups;
  int32_t is_words, n_axes;
  const int64_t* shape;
};

// The number of a new part, or 0: bop2nd_part_error says why. The tensors have to stay until it is freed.
BOP2ND_EXPORT int64_t bop2nd_part_new(const char* graph, const bop2nd_part_tensor* tensors, int32_t n_tensors,
                                      int32_t fused_norms) {
  try {
    runtime::StoredTensors stored;
    for (int32_t i = 0; i < n_tensors; ++i) {
      const bop2nd_part_tensor& t = tensors[i];
      runtime::Type type = t.is_words ? runtime::Type::kI32 : runtime::Type::kF32;
      stored[t.name] = {type, runtime::Sizes(t.shape, t.shape + t.n_axes), t.data};
    }
    auto norms = fused_norms ? runtime::NormRounding::kTorchFused : runtime::NormRounding::kTorch;
    auto part = std::make_shared<Part>();
    for (int32_t i = 0; i < n_tensors; ++i) {
      const bop2nd_part_tensor& t = tensors[i];
      ScalarType dtype = t.is_words ? ScalarType::Int : ScalarType::Float;
      part->held.push_back({t.data, dtype, Ints(t.shape, t.shape + t.n_axes)});
    }
    part->network = runtime::Network::part(graph, std::move(stored), norms);
    for (int32_t i = 0; i < n_tensors; ++i) {
      const bop2nd_part_tensor& t = tensors[i];
      if (t.blocked)
        part->network->prepared().put(runtime::blocked_key(t.data, t.groups),
                                      static_cast<const uint32_t*>(t.blocked));
    }
    std::lock_guard<std::mutex> lock(parts().mutex);
    parts().by_number[parts().next] = part;
    return parts().next++;
  } catch (const std::exception& error) {
    why_not = error.what();
    return 0;
  }
}

BOP2ND_EXPORT const char* bop2nd_part_error(void) { return why_not.c_str(); }

BOP2ND_EXPORT void bop2nd_part_free(int64_t number) {
  std::shared_ptr<Part> freed;  // outside of the lock
  std::lock_guard<std::mutex> lock(parts().mutex);
  auto found = parts().by_number.find(number);
  if (found == parts().by_number.end()) return;
  freed = std::move(found->second);
  parts().by_number.erase(found);
}
