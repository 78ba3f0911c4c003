// SPDX-License-Identifier: Apache-2.0
// How close the loops come to their yardsticks, on one thread; best of many short runs. Not a test.
// usage: bench_core [seconds per table] [first instruction set] [part of a product's name: only those
// products; or "threads": what a second thread gains]
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "core/bit_layout.h"
#include "cpu/dispatch.h"
#include "cpu/operators.h"
#include "cpu/parallel.h"

using namespace bop2nd;
using Clock = std::chrono::steady_clock;

extern "C" double bop2nd_register_loop(int id, int64_t iterations);
extern "C" double bop2nd_bandwidth_loop(int64_t n_tensors, const void* const* grads, void* const* ms,
                                        void* const* vs, int32_t* const* words, const int64_t* n_weights,
                                        int grad_bytes, int state_bytes);

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

// A convolution of a residual network, whose values are scaled, shifted and added, and leave signs as well.
void add_residual(std::vector<Case>& cases, const std::string& wanted) {
  std::string name = "conv 3x3 64 @ 56, residual";
  if (name.find(wanted) == std::string::npos) return;
  ConvShape s{.batch = 1, .height = 56, .width = 56, .channels = 64, .out_channels = 64};
  s.kernel[0] = s.kernel[1] = 3, s.padding[0] = s.padding[1] = 1;
  OnLines<uint32_t> x(56 * 56 * 2, 0x55u), w(64 * 9 * 2, 0x33u);
  OnLines<float> out(56 * 56 * 64, 0.0f), residual = out, scale(64, 0.1f), shift(64, 0.1f);
  OnLines<uint32_t> signs(56 * 56 * 2, 0);
  cases.push_back({name, 166.0 * 166.0 * 64 * 64, [=]() mutable {
                     Epilogue to;
                     to.values = out.data(), to.signs = signs.data(), to.residual = residual.data();
                     to.scale = scale.data(), to.shift = shift.data();
                     binary_conv(s, x.data(), w.data(), to);
                   }});
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
  add_residual(cases, wanted);
  run_interleaved(cases, seconds);
  report(cases, 1e-9, "GMAC/s");
}

// A second thread that waits for work without ever sleeping, to see what the work itself gains from it.
class SecondThread {
 public:
  SecondThread() : thread_([this] { serve(); }) { me() = this; }
  ~SecondThread() {
    body_ = nullptr;
    asked_.fetch_add(1);
    thread_.join();
  }
  void use(bool both) {
    install_pool(both ? ThreadPool{halves, [](void*) { return 2; }}
                      : ThreadPool{whole, [](void*) { return 1; }});
  }
  static void halves(void*, int64_t n, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
    SecondThread& second = *me();
    int64_t half = (n + 1) / 2;
    second.body_ = body, second.context_ = context, second.begin_ = half, second.end_ = n;
    second.done_.store(false);
    second.asked_.fetch_add(1);
    body(0, half, context);
    while (!second.done_.load()) {
    }
  }

 private:
  static void whole(void*, int64_t n, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
    body(0, n, context);
  }
  static SecondThread*& me() {
    static SecondThread* second;
    return second;
  }
  void serve() {
    for (int seen = 0;; ++seen) {
      while (asked_.load() == seen) {
      }
      if (!body_) return;
      body_(begin_, end_, context_);
      done_.store(true);
    }
  }

  std::atomic<int> asked_{0};
  std::atomic<bool> done_{false};
  void (*body_)(int64_t, int64_t, void*) = nullptr;
  void* context_ = nullptr;
  int64_t begin_ = 0, end_ = 0;
  std::thread thread_;
};

// One convolution alone, two of them at once that share nothing, and one on both threads.
void bench_threads(double seconds) {
  SecondThread second;
  for (int64_t c : {64, 128, 256, 512}) {
    int64_t size = 56 * 64 / c;
    ConvShape s{.batch = 1, .height = size, .width = size, .channels = c, .out_channels = c};
    s.kernel[0] = s.kernel[1] = 3, s.padding[0] = s.padding[1] = 1;
    size_t pixels = static_cast<size_t>(size * size), channels = static_cast<size_t>(c);
    struct Operands {
      OnLines<uint32_t> x, w;
      OnLines<float> out;
    };
    std::vector<Operands> operands(
        2,
        {{pixels * channels / 32, 0x55u}, {channels * channels * 9 / 32, 0x33u}, {pixels * channels, 0.0f}});
    auto run = [&](size_t i) {
      Epilogue to;
      to.values = operands[i].out.data();
      binary_conv(s, operands[i].x.data(), operands[i].w.data(), to);
    };
    auto run_each = [](int64_t begin, int64_t end, void* context) {
      for (; begin < end; ++begin) (*static_cast<decltype(run)*>(context))(static_cast<size_t>(begin));
    };
    std::vector<Case> cases = {
        {"alone", 1.0, [&] { second.use(false), run(0); }},
        {"two", 2.0, [&] { second.use(false), SecondThread::halves(nullptr, 2, 1, run_each, &run); }},
        {"one on both", 1.0, [&] { second.use(true), run(0); }}};
    run_interleaved(cases, seconds / 4);
    second.use(false);
    std::printf("  conv 3x3 %3lld: alone %.1f us; two at once %.2fx its rate, one on both threads %.2fx\n",
                static_cast<long long>(c), cases[0].best * 1e6, 2 * cases[0].best / cases[1].best,
                cases[0].best / cases[2].best);
  }
}

// Both gradients of convolutions against sums of operands in the nearest cache: 256 rows of 32 signs.
void bench_gradients(int id, double seconds) {
  const SumTable& table = *table_of(id)->sums;
  constexpr int64_t kRows = 256, kRepeats = 200;
  OnLines<float> reals(static_cast<size_t>(kWordBits * table.lanes), 0.1f);
  OnLines<float> sums(static_cast<size_t>(kRows * table.lanes), 0.0f);
  OnLines<uint32_t> signs(kRows, 0x2B7E1516u);
  std::vector<Case> cases;
  cases.push_back(
      {"sums from the nearest cache", static_cast<double>(kRepeats * kRows * kWordBits * table.lanes), [&] {
         for (int64_t i = 0; i < kRepeats; ++i)
           table.signed_sums({reals.data(), table.lanes, 1, signs.data(), 0, 1, 0, kRows, sums.data(), true});
       }});
  auto add = [&](const std::string& name, const ConvShape& s) {
    size_t pixels = static_cast<size_t>(s.batch * s.height * s.width);
    size_t n_weights = static_cast<size_t>(s.out_channels * s.taps() * s.channels);
    OnLines<float> grad(pixels * static_cast<size_t>(s.out_channels), 0.1f), grad_w(n_weights, 0.0f);
    OnLines<float> grad_x(pixels * static_cast<size_t>(s.channels), 0.0f);
    OnLines<uint32_t> x(grad_x.memory.size() / 32 + 1, 0x2B7E1516u), w(n_weights / 32 + 1, 0x28AED2A6u);
    double products = static_cast<double>(n_weights * pixels);
    cases.push_back({name + ", input", products, [=]() mutable {
                       conv_input_gradient(s, Dtype::kFloat32, grad.data(), w.data(), x.data(),
                                           grad_x.data());
                     }});
    cases.push_back({name + ", weight", products, [=]() mutable {
                       conv_weight_gradient(s, Dtype::kFloat32, grad.data(), x.data(), grad_w.data());
                     }});
  };
  add("conv 3x3 128 @ 30", {4, 30, 30, 128, 1, 128, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0});
  add("conv 3x3 512 @ 7", {16, 7, 7, 512, 1, 512, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0});
  add("linear 1024, batch 256", {256, 1, 1, 1024, 1, 1024, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 0});
  run_interleaved(cases, seconds);
  report(cases, 1e-9, "GMAC/s");
}

// The step with gradients and moments of type T against the loop that only reads and writes as many bytes.
template <class T>
void bench_step_of(const char* name, Dtype dtype, T grad, int64_t n_weights, double seconds) {
  size_t n = static_cast<size_t>(n_weights);
  OnLines<T> g(n, grad), m(n, T{}), v(n, T{}), read[3] = {{n, grad}, {n, T{}}, {n, T{}}};
  OnLines<int32_t> words(n / 32, 0), read_words(n / 32, 0);
  StepOperand t{.weight = words.data(),
                .grad = g.data(),
                .exp_avg = m.data(),
                .exp_avg_sq = v.data(),
                .weight_type = Dtype::kPacked,
                .grad_type = dtype,
                .state_type = dtype,
                .rows = 1,
                .length = n_weights,
                .key = 0};
  int64_t counts[2];
  int64_t repeats = n_weights < (1 << 18) ? (1 << 18) / n_weights : 1;
  double bytes = (5.0 * sizeof(T) + 0.25) * static_cast<double>(n_weights * repeats);
  std::vector<Case> cases = {{"read and write only", bytes,
                              [&] {
                                const void* grad = g.data();
                                void *first = m.data(), *second = v.data();
                                int32_t* signs = words.data();
                                for (int64_t i = 0; i < repeats; ++i)
                                  bop2nd_bandwidth_loop(1, &grad, &first, &second, &signs, &n_weights,
                                                        sizeof(T), sizeof(T));
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
    if (argc > 3 && std::string(argv[3]) == "threads") {
      bench_threads(seconds);
      continue;
    }
    bench_matmul(id, seconds, argc > 3 ? argv[3] : "");
    if (argc > 3) continue;
    bench_gradients(id, seconds);
    bench_step(seconds);
  }
}
