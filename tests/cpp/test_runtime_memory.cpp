// SPDX-License-Identifier: Apache-2.0
// The system runs out of memory at every single allocation of loading, planning and running: an error each
// time, and nothing is left behind. A run with known sizes allocates nothing.
#include <atomic>
#include <new>

#include "../../include/bop2nd_runtime.h"
#include "cpu/dispatch.h"
#include "golden.h"

namespace {

std::atomic<int64_t> left{-1};  // allocations until one fails; negative: none does
std::atomic<int64_t> held{0}, made{0};

void* allocate(size_t n) {
  if (left.load() >= 0 && left.fetch_sub(1) == 0) return nullptr;
  void* p = std::malloc(n ? n : 1);
  if (p) ++held, ++made;
  return p;
}

void* allocate_or_throw(size_t n) {
  if (void* p = allocate(n)) return p;
  throw std::bad_alloc();
}

void release(void* p) {
  if (p) --held;
  std::free(p);
}

}  // namespace

void* operator new(size_t n) { return allocate_or_throw(n); }
void* operator new[](size_t n) { return allocate_or_throw(n); }
void operator delete(void* p) noexcept { release(p); }
void operator delete[](void* p) noexcept { release(p); }
void operator delete(void* p, size_t) noexcept { release(p); }
void operator delete[](void* p, size_t) noexcept { release(p); }

namespace {

// The first status that is no success.
bop2nd_status whole_way(const std::string& path, bop2nd_tensor& input, int64_t* of_second_run) {
  bop2nd_network* network = nullptr;
  bop2nd_context* context = nullptr;
  bop2nd_tensor outputs[16];
  bop2nd_status status = bop2nd_load_file(path.c_str(), nullptr, &network);
  if (status == BOP2ND_OK) status = bop2nd_context_new(network, 1, &context);
  int32_t n_outputs = bop2nd_n_outputs(network);
  if (status == BOP2ND_OK) status = bop2nd_run(context, &input, 1, outputs, n_outputs);
  if (status == BOP2ND_OK) {
    int64_t before = made;
    status = bop2nd_run(context, &input, 1, outputs, n_outputs);
    *of_second_run = made - before;
  }
  bop2nd_context_free(context), bop2nd_free(network);
  return status;
}

}  // namespace

int main() {
  const std::string data = std::string(BOP2ND_TEST_DATA) + "/packed_";
  std::vector<float> memory = golden_values(2 * 5 * 6 * 7, 41);
  int64_t second = 0;
  const bop2nd_tensor inputs[] = {{memory.data(), BOP2ND_FLOAT32, 4, {2, 5, 6, 7}, nullptr},
                                  {memory.data(), BOP2ND_UINT8, 4, {2, 3, 6, 7}, nullptr},
                                  {memory.data(), BOP2ND_FLOAT32, 4, {2, 3, 6, 7}, nullptr}};
  const char* names[] = {"words", "signed", "residual"};
  for (int isa = 0; isa < bop2nd_isa_count(); ++isa) {
    if (bop2nd_isa_force(isa) != 0) continue;
    for (int i = 0; i < 3; ++i) {
      bop2nd_tensor input = inputs[i];
      bop2nd_status status = whole_way(data + names[i] + ".safetensors", input, &second);
      CHECK(status == BOP2ND_OK, "%s", bop2nd_last_error());
      CHECK(second == 0, "%s on %s: a second run makes %lld allocations", names[i], bop2nd_isa_name(isa),
            static_cast<long long>(second));
    }
  }
  bop2nd_isa_force(-1);
  std::string path = data + "residual.safetensors";
  bop2nd_tensor input = inputs[2];
  // What is made once for ever.
  CHECK(whole_way(path, input, &second) == BOP2ND_OK, "%s", bop2nd_last_error());
  int64_t before = held, n_failures = 0;
  for (int64_t at = 0;; ++at) {
    left = at;
    bop2nd_status status = whole_way(path, input, &second);
    bool all = left.exchange(-1) >= 0;
    CHECK(held == before, "%lld allocations are left behind after failure %lld",
          static_cast<long long>(held - before), static_cast<long long>(at));
    if (all) {
      CHECK(status == BOP2ND_OK, "%s", bop2nd_last_error());
      break;
    }
    CHECK(status == BOP2ND_ERROR_MEMORY, "failure %lld: status %d, %s", static_cast<long long>(at), status,
          bop2nd_last_error());
    ++n_failures;
  }
  CHECK(n_failures > 1000, "only %lld allocations were seen", static_cast<long long>(n_failures));
  std::printf("%lld failed allocations\n", static_cast<long long>(n_failures));
  return 0;
}
