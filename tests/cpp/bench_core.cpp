// SPDX-License-Identifier: Apache-2.0
// How close the loops come to their yardsticks, on one thread; best of many short runs. Not a test.
// usage: bench_core [seconds per table] [first instruction set] [part of a product's name: only those
// products]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/operators.h"

using namespace bop2nd;
using Clock = std::chrono::steady_clock;

extern "C" double bop2nd_register_loop(int id, int64_t iterations);
extern "C" double bop2nd_bandwidth_loop(const void* grad, void* m, void* v, int32_t* words, int64_t n,
                                        int element_bytes);

// Memory on cache lines, as torch's is: a 64-byte store across two lines costs two.
template <class T>
struct OnLines {
  std::vector<T> memory;

  OnLines(size_t n, T value) : memory(n + 64 / sizeof(T), value) {}
  T* data() {
    size_t past_line = reinterpret_cast<uintptr_t>(memory.data()) % 64;
    return memory.data() + (64 - past_line) / sizeof(T) % (64 / sizeof(T));
  }
};

struct Case {
  std::string name;
  double work;  // multiply-accumulates or bytes
  std::function<void()> run;
  double best = 1e30;
};

void run_interleaved(std::vector<Case>& cases, double seconds) {
  auto end = Clock::now() + std::chrono::duration<double>(seconds);
  do {
    for (Case& c : cases) {
      for (int i = 0; i < 5; ++i) {  // the first finds its operands out of the caches
        auto start = Clock::now();
        c.run();
        c.best = std::min(c.best, std::chrono::duration<double>(Clock::now() - start).count());
      }
    }
  } while (Clock::now() < end);
}

// The first case is the yardstick.
void report(const std::vector<Case>& cases, double scale, const char* unit) {
  double limit = cases[0].work / cases[0].best;
  for (const Case& c : cases) {
    double rate = c.work / c.best;
    std::printf("  %-28s %9.1f us %8.1f %s  %.2f\n", c.name.c_str(), c.best * 1e6, rate * scale, unit,
                rate / limit);
  }
}

void bench_matmul(int id, double seconds, const std::string& wanted) {
  std::vector<Case> cases;
  cases.push_back({"register loop", bop2nd_register_loop(id, 100), [=] { bop2nd_register_loop(id, 100); }});
  auto add = [&](const std::string& name, const ConvShape& s, double products) {
    if (name.find(wanted) == std::string::npos) return;
    OnLines<uint32_t> x(static_cast<size_t>(s.batch * s.height * s.width * s.group_words()), 0x55u);
    OnLines<uint32_t> w(static_cast<size_t>(s.group_blocks() * s.taps() * s.group_words() * 16), 0x33u);
    OnLines<float> out(static_cast<size_t>(s.batch * s.out_size(0) * s.out_size(1) * s.out_channels), 0.0f);
    cases.push_back({name, products, [=]() mutable {
                       Epilogue to;
                       to.values = out.data();
                       binary_conv(s, x.data(), w.data(), to);
                     }});
  };
  for (int64_t c : {64, 128, 256, 512}) {
    int64_t size = 56 * 64 / c;
    double taps = static_cast<double>((3 * size - 2) * (3 * size - 2));  // padded taps are left out
    add("conv 3x3 " + std::to_string(c) + " @ " + std::to_string(size),
        {1, size, size, c, 1, c, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0}, taps * static_cast<double>(c * c));
  }
  for (int64_t words : {2, 9, 18, 36, 72, 144}) {
    add("sums of " + std::to_string(words) + " words",
        {512, 1, 1, 32 * words, 1, 64, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 0},
        static_cast<double>(512 * 64 * 32 * words));
  }
  for (int64_t m : {1, 256}) {
    add("linear 1024, batch " + std::to_string(m),
        {m, 1, 1, 1024, 1, 1024, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 0}, static_cast<double>(m << 20));
  }
  run_interleaved(cases, seconds);
  report(cases, 1e-9, "GMAC/s");
}

// The step with gradients and moments of type T against the loop that only reads and writes as many bytes.
template <class T>
void bench_step_of(const char* name, Dtype dtype, T grad, int64_t n_weights, double seconds) {
  size_t n = static_cast<size_t>(n_weights);
  OnLines<T> g(n, grad), m(n, T{}), v(n, T{}), read[3] = {{n, grad}, {n, T{}}, {n, T{}}};
  OnLines<int32_t> words(n / 32, 0), read_words(n / 32, 0);
  StepTensor t{words.data(), g.data(), m.data(), v.data(), Dtype::kPacked, dtype, dtype, 1, n_weights, 0};
  int64_t counts[2];
  int64_t repeats = n_weights < (1 << 18) ? (1 << 18) / n_weights : 1;
  double bytes = (5.0 * sizeof(T) + 0.25) * static_cast<double>(n_weights * repeats);
  std::vector<Case> cases = {{"read and write only", bytes,
                              [&] {
                                for (int64_t i = 0; i < repeats; ++i)
                                  bop2nd_bandwidth_loop(g.data(), m.data(), v.data(), words.data(), n_weights,
                                                        sizeof(T));
                              }},
                             {std::string("step, ") + name, bytes, [&] {
                                for (int64_t i = 0; i < repeats; ++i)
                                  bop_step({t}, {1e-3f, 1e-2f, 1e-3f, 1e-9f, 1.0f}, counts);
                              }}};
  run_interleaved(cases, seconds);
  report(cases, 1e-9, "GB/s");
  double weights = static_cast<double>(n_weights * repeats);
  std::printf("  %-28s %9.2f ns a 16 weights, the step %.2f ns\n", "", cases[0].best * 16e9 / weights,
              cases[1].best * 16e9 / weights);
}

void bench_step(double seconds) {
  for (auto [where, n] : {std::pair<const char*, int64_t>{"first-level cache", 3 << 9},
                          {"second-level cache", 1 << 15},
                          {"memory", 1 << 24}}) {
    std::printf("  %lld weights: %s\n", static_cast<long long>(n), where);
    bench_step_of<float>("fp32", Dtype::kFloat32, 0.1f, n, seconds);
    bench_step_of<BFloat16>("bf16", Dtype::kBFloat16, {0x3DCD}, n, seconds);
  }
}

int main(int argc, char** argv) {
  double seconds = argc > 1 ? std::atof(argv[1]) : 3.0;
  for (int id = argc > 2 ? std::atoi(argv[2]) : 0; id < bop2nd_isa_count(); ++id) {
    if (bop2nd_isa_force(id) != 0) continue;
    std::printf("%s\n", bop2nd_isa_name(id));
    bench_matmul(id, seconds, argc > 3 ? argv[3] : "");
    if (argc <= 3) bench_step(seconds);
  }
}
