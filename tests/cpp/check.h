// SPDX-License-Identifier: Apache-2.0
// What the C++ tests of the core share: random numbers, guarded memory, every instruction set of this
// machine.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check_macro.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "emulated_instructions.h"

struct Random {
  uint64_t state = 88172645463325252ull;

  uint64_t next() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
  }
  uint32_t word() { return static_cast<uint32_t>(next() >> 16); }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  // In -2..2, with the awkward numbers among them.
  float real() {
    static const uint32_t special[] = {0x80000000u, 0x00000000u, 0x7FC00000u, 0xFFC00000u, 0x7F800000u,
                                       0xFF800000u, 0x3F800000u, 0xBF800000u, 0x80000001u, 0x00000001u};
    float x = static_cast<float>(static_cast<int64_t>(word())) / 1073741824.0f - 2.0f;
    int64_t pick = below(60);
    if (pick < 10) std::memcpy(&x, &special[pick], 4);
    return x;
  }
};

// n values between guards: whoever writes outside is found out, whoever leaves something unwritten as well.
template <class T>
struct Guarded {
  static constexpr size_t kGuard = 64;
  std::vector<T> memory;

  explicit Guarded(size_t n) : memory(n + 2 * kGuard) {
    std::memset(memory.data(), 0xA5, memory.size() * sizeof(T));
  }
  T* data() { return memory.data() + kGuard; }
  size_t size() const { return memory.size() - 2 * kGuard; }
  T& operator[](int64_t i) { return data()[i]; }
  void check_guards(const char* what) const {
    T poison;
    std::memset(&poison, 0xA5, sizeof(T));
    for (size_t i = 0; i < kGuard; ++i) {
      bool intact = std::memcmp(&memory[i], &poison, sizeof(T)) == 0 &&
                    std::memcmp(&memory[memory.size() - 1 - i], &poison, sizeof(T)) == 0;
      CHECK(intact, "%s wrote outside its output", what);
    }
  }
};

// Runs test(name) once per instruction set, with it in force, on one thread and on three.
template <class Test>
void on_every_instruction_set(const Test& test) {
  static const bop2nd::ThreadPool three = {
      [](void*, int64_t n, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
        std::vector<std::thread> threads;
        for (int64_t i = 0; i < 3; ++i)
          threads.emplace_back([=] { body(i * n / 3, (i + 1) * n / 3, context); });
        for (std::thread& thread : threads) thread.join();
      },
      [](void*) { return 3; }};
  const bop2nd::ThreadPool one = bop2nd::pool();
  for (const bop2nd::ThreadPool& pool : {one, three}) {
    bop2nd::install_pool(pool);
    for (int id = 0; id < bop2nd_isa_count(); ++id) {
      if (!bop2nd_isa_supported(id)) {
        std::printf("%s: not on this CPU (needs %s)\n", bop2nd_isa_name(id), bop2nd_isa_requires(id));
        continue;
      }
      CHECK(bop2nd_isa_force(id) == 0, "%s", bop2nd_isa_name(id));
      int64_t before = bop2nd_isa_calls(id);
      test(bop2nd_isa_name(id));
      CHECK(bop2nd_isa_calls(id) > before, "%s was forced but did not run", bop2nd_isa_name(id));
    }
    bop2nd_isa_force(-1);
    for (auto [name, table] : {std::pair{"emulated bitalg", emulated_bitalg_table()},
                               std::pair{"emulated amx", emulated_amx_table()}}) {
      if (!table) continue;
      bop2nd::override_table(table);
      test(name);
      bop2nd::override_table(nullptr);
    }
  }
  bop2nd::install_pool(one);
}
