// SPDX-License-Identifier: Apache-2.0
// The shared library loaded, used on several threads and unloaded, again and again: it is really gone each
// time, and nothing stays behind.
#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>

#include "../../include/bop2nd_runtime.h"
#include "golden.h"

namespace {

const char* kLibrary = BOP2ND_RUNTIME_LIBRARY;

template <class Function>
Function* symbol(void* library, const char* name) {
  void* found = dlsym(library, name);
  CHECK(found, "%s", dlerror());
  return reinterpret_cast<Function*>(found);
}

void predict(void* library) {
  const std::string path = std::string(BOP2ND_TEST_DATA) + "/packed_words.safetensors";
  bop2nd_network* network = nullptr;
  bop2nd_context* context = nullptr;
  auto* load = symbol<decltype(bop2nd_load_file)>(library, "bop2nd_load_file");
  CHECK(load(path.c_str(), nullptr, &network) == BOP2ND_OK, "load");
  CHECK(load("/nonexistent", nullptr, &network) == BOP2ND_ERROR_IO, "a missing file");
  CHECK(
      symbol<decltype(bop2nd_context_new)>(library, "bop2nd_context_new")(network, 3, &context) == BOP2ND_OK,
      "context");
  std::vector<float> values = golden_values(2 * 5 * 6 * 7, 40);
  bop2nd_tensor input{}, outputs[8];
  input.data = values.data(), input.n_axes = 4;
  input.shape[0] = 2, input.shape[1] = 5, input.shape[2] = 6, input.shape[3] = 7;
  auto* run = symbol<decltype(bop2nd_run)>(library, "bop2nd_run");
  for (int i = 0; i < 3; ++i) CHECK(run(context, &input, 1, outputs, 8) == BOP2ND_OK, "run %d", i);
  symbol<decltype(bop2nd_context_free)>(library, "bop2nd_context_free")(context);
  symbol<decltype(bop2nd_free)>(library, "bop2nd_free")(network);
}

std::atomic<int64_t> held{0};

}  // namespace

// Exported, so that the library takes these.
void* operator new(size_t n) {
  void* p = std::malloc(n ? n : 1);
  if (!p) throw std::bad_alloc();
  ++held;
  return p;
}
void* operator new[](size_t n) { return operator new(n); }
void operator delete(void* p) noexcept {
  if (p) --held;
  std::free(p);
}
void operator delete[](void* p) noexcept { operator delete(p); }
void operator delete(void* p, size_t) noexcept { operator delete(p); }
void operator delete[](void* p, size_t) noexcept { operator delete(p); }

int main() {
  int64_t before = held;
  for (int round = 0; round < 12; ++round) {
    void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    CHECK(library, "%s", dlerror());
    // Memory of a thread lives until it ends, and the library as long as it.
    int64_t most = 0;
    std::thread([&] { predict(library), most = held; }).join();
    CHECK(most > before, "what the library allocates is not seen");
    CHECK(dlclose(library) == 0, "%s", dlerror());
    CHECK(!dlopen(kLibrary, RTLD_NOW | RTLD_NOLOAD), "round %d: it is still loaded", round);
    CHECK(held == before, "round %d: %lld allocations stay behind", round,
          static_cast<long long>(held - before));
  }
  std::printf("reload: good\n");
  return 0;
}
