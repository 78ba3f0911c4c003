// SPDX-License-Identifier: Apache-2.0
// The step against a plain statement of the rule, bit for bit.
#include <cmath>

#include "check.h"
#include "core/bit_layout.h"
#include "core/rounding.h"
#include "core/half_float.h"
#include "cpu/operators.h"

using namespace bop2nd;

const StepHyper kHyper = {.gamma = 0.03f, .sigma = 0.07f, .a = 0.4f, .b = 0.011f, .grad_scale = -1.7f};

// One element as the specification says it; returns whether it flips.
bool plain_rule(float grad, float& m, float* v, bool negative, bool& candidate, const StepHyper& h = kHyper) {
  float g = grad * h.grad_scale;
  float change = g - m;
  change = h.gamma * change;
  m = m + change;
  float bound = h.b;
  if (v) {
    float square = g * g;
    float step = square - *v;
    step = h.sigma * step;
    *v = *v + step;
    bound = h.a * static_cast<float>(std::sqrt(static_cast<double>(*v)));
    bound = bound + h.b;
  }
  candidate = (m < 0) == negative;
  return candidate && std::fabs(m) > bound;
}

uint32_t plain_random(uint32_t key, uint64_t index) {
  auto mix = [](uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
  };
  return mix(static_cast<uint32_t>(index) ^ (key + static_cast<uint32_t>(index >> 32) * 0x9E3779B9u));
}

float rounded(float x, float, uint32_t) { return x; }
BFloat16 rounded(float x, BFloat16, uint32_t random16) {
  uint32_t bits = bits_of_float(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  if (std::isinf(x)) return {static_cast<uint16_t>(bits >> 16)};
  return {static_cast<uint16_t>((bits + random16) >> 16)};
}

template <class T>
bool same(T a, T b) {
  float x = to_float(a), y = to_float(b);
  return x == y ? std::signbit(x) == std::signbit(y) : x != x && y != y;
}

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = Dtype::kFloat32;
};
template <>
struct DtypeOf<BFloat16> {
  static constexpr Dtype value = Dtype::kBFloat16;
};
template <>
struct DtypeOf<Float16> {
  static constexpr Dtype value = Dtype::kFloat16;
};

// W is the type of dense weights, uint32_t for packed ones.
template <class G, class S, class W>
void check_step(const char* isa, bool second) {
  constexpr bool packed = std::is_same_v<W, uint32_t>;
  Random random;
  struct Case {
    int64_t rows, length;
    Guarded<W> w;
    std::vector<G> g;
    Guarded<S> m, v;
    std::vector<W> w_before;
    std::vector<S> m_before, v_before;
  };
  std::vector<Case> cases;
  std::vector<StepOperand> tensors;
  for (auto [rows, length] : {std::pair<int64_t, int64_t>{1, 0},
                              {1, 1},
                              {3, 31},
                              {2, 32},
                              {2, 33},
                              {1, 63},
                              {5, 64},
                              {1, 65},
                              {3, 511},
                              {2, 512},
                              {1, 513},
                              {1, 1031},
                              {40, 96},
                              {9, 1000},
                              {3, 30011},  // element 2^16 within a word
                              {1, 65600}}) {
    size_t n = static_cast<size_t>(rows * length);
    size_t n_weights = packed ? static_cast<size_t>(rows * words_for(length)) : n;
    cases.push_back(
        {rows, length, Guarded<W>(n_weights), std::vector<G>(n), Guarded<S>(n), Guarded<S>(n), {}, {}, {}});
    Case& c = cases.back();
    for (size_t i = 0; i < n_weights; ++i) {
      int64_t word = static_cast<int64_t>(i) % (words_for(length) > 0 ? words_for(length) : 1);
      if constexpr (packed)
        c.w[static_cast<int64_t>(i)] = random.word() & low_bits(BitLayout{length}.elements_in(word));
      else
        c.w[static_cast<int64_t>(i)] = from_float<W>(random.word() & 1 ? -1.0f : 1.0f);
    }
    for (size_t i = 0; i < n; ++i) {
      c.g[i] = from_float<G>(random.real());
      c.m[static_cast<int64_t>(i)] = rounded(random.real() * 0.1f, S{}, 0);
      c.v[static_cast<int64_t>(i)] = rounded(std::fabs(random.real()) * 0.1f, S{}, 0);
    }
    c.w_before.assign(c.w.data(), c.w.data() + n_weights);
    c.m_before.assign(c.m.data(), c.m.data() + n);
    c.v_before.assign(c.v.data(), c.v.data() + n);
  }
  for (size_t i = 0; i < cases.size(); ++i) {
    Case& c = cases[i];
    StepOperand t{.weight = c.w.data(),
                  .grad = c.g.data(),
                  .exp_avg = c.m.data(),
                  .exp_avg_sq = second ? c.v.data() : nullptr,
                  .weight_type = Dtype::kPacked,
                  .grad_type = DtypeOf<G>::value,
                  .state_type = DtypeOf<S>::value,
                  .rows = c.rows,
                  .length = c.length,
                  .key = 77u * static_cast<uint32_t>(i)};
    if constexpr (!packed) t.weight_type = DtypeOf<W>::value, t.length *= t.rows, t.rows = 1;
    tensors.push_back(t);
  }
  Guarded<int64_t> counts(2 * cases.size());
  bop_step(tensors, kHyper, counts.data());
  counts.check_guards(isa);
  for (size_t i = 0; i < cases.size(); ++i) {
    Case& c = cases[i];
    c.w.check_guards(isa), c.m.check_guards(isa), c.v.check_guards(isa);
    int64_t candidates = 0, flips = 0;
    for (int64_t e = 0; e < c.rows * c.length; ++e) {
      int64_t column = e % c.length, word = e / c.length * words_for(c.length) + BitLayout::word_of(column);
      int bit = BitLayout::bit_of(column);
      size_t at = static_cast<size_t>(e);
      float m = to_float(c.m_before[at]), v = to_float(c.v_before[at]);
      bool negative, now, candidate;
      if constexpr (packed) {
        negative = (c.w_before[static_cast<size_t>(word)] >> bit) & 1, now = (c.w[word] >> bit) & 1;
      } else {
        negative = to_float(c.w_before[at]) < 0, now = to_float(c.w[e]) < 0;
        CHECK(std::fabs(to_float(c.w[e])) == 1.0f, "%s dense weight", isa);
      }
      bool flip = plain_rule(to_float(c.g[at]), m, second ? &v : nullptr, negative, candidate);
      uint32_t bits = plain_random(tensors[i].key, static_cast<uint64_t>(e));
      CHECK(now == (negative != flip), "%s tensor %zu element %ld", isa, i, (long)e);
      CHECK(same(c.m[e], rounded(m, S{}, bits & 0xFFFF)), "%s m of tensor %zu element %ld", isa, i, (long)e);
      if (second)
        CHECK(same(c.v[e], rounded(v, S{}, bits >> 16)), "%s v of tensor %zu element %ld", isa, i, (long)e);
      candidates += candidate, flips += flip;
    }
    if constexpr (packed) {  // bits that hold no weight are still 0
      for (int64_t r = 0; r < c.rows && c.length % kWordBits; ++r) {
        uint32_t last = c.w[(r + 1) * words_for(c.length) - 1];
        CHECK((last & ~low_bits(static_cast<int>(c.length % kWordBits))) == 0, "%s tail of tensor %zu", isa,
              i);
      }
    }
    CHECK(counts[2 * (int64_t)i] == candidates && counts[2 * (int64_t)i + 1] == flips,
          "%s counts of tensor %zu", isa, i);
    CHECK(c.rows * c.length < 500 || (flips > 0 && flips < candidates), "tensor %zu decides nothing", i);
  }
}

// Values of m at the threshold of `v` and around it, where one that was only estimated would decide wrongly.
void add_around_bound(const StepHyper& h, float v, std::vector<float>& m) {
  float bound = h.a * static_cast<float>(std::sqrt(static_cast<double>(v)));
  bound = bound + h.b;
  float near[] = {bound,
                  std::nextafter(bound, INFINITY),
                  std::nextafter(bound, -INFINITY),
                  h.b,
                  bound * (1.0f + 0x1p-17f),
                  bound * (1.0f - 0x1p-17f),
                  bound * 0.5f,
                  bound * 2.0f};
  m.assign({0.0f, 0x1p-149f, INFINITY, NAN});
  for (float x : near) m.push_back(x), m.push_back(-x);
}

// Moments that the step leaves as m (from gradients, gamma = 1) and v (sigma = 0), for extreme
// hyperparameters as well.
template <class S>
void check_threshold(const char* isa, float a, float b) {
  const StepHyper h = {.gamma = 1.0f, .sigma = 0.0f, .a = a, .b = b, .grad_scale = 1.0f};
  Random random;
  std::vector<float> g, v, m_here;
  auto add = [&](float second) {
    if (sizeof(S) == 2) second = float_of_bits(bits_of_float(second) & 0xFFFF0000u);
    add_around_bound(h, second, m_here);
    for (float m : m_here) g.push_back(m), v.push_back(second);
  };
  for (uint32_t bits : {0u, 1u, 2u, 3u, 0x400000u, 0x7FFFFFu, 0x800000u, 0x800001u, 0x10000u, 0x7F7FFFFFu,
                        0x7F800000u, 0x7FC00000u, 0x80000000u, 0xBF800000u}) {
    add(float_of_bits(bits));
  }
  for (int i = 0; i < 400; ++i) add(float_of_bits(random.word() & 0x7FFFFFFFu));  // any exponent
  for (int i = 0; i < 400; ++i) add(std::fabs(random.real()));
  size_t n = g.size();
  for (uint32_t word : {0u, ~0u}) {
    std::vector<uint32_t> w(static_cast<size_t>(words_for(static_cast<int64_t>(n))), word);
    std::vector<S> m(n, S{}), second(n);
    for (size_t i = 0; i < n; ++i) second[i] = rounded(v[i], S{}, 0);
    int64_t counts[2];
    bop_step({{w.data(), g.data(), m.data(), second.data(), Dtype::kPacked, Dtype::kFloat32,
               DtypeOf<S>::value, 1, static_cast<int64_t>(n), 5}},
             h, counts);
    for (size_t i = 0; i < n; ++i) {
      float m_want = 0.0f, v_want = v[i];
      bool candidate, flip = plain_rule(g[i], m_want, &v_want, word != 0, candidate, h);
      bool flipped = (((w[i / 32] ^ word) >> (i % 32)) & 1) != 0;
      CHECK(flipped == flip, "%s a %g b %g m %a v %a", isa, a, b, m_want, v_want);
    }
  }
}

void check_thresholds(const char* isa) {
  const float hyper[][2] = {{1e-6f, 1e-16f},   {1e-11f, 1e-22f},  {3e-14f, 0.0f},  {0x1p-50f, 0.0f},
                            {0x1p-51f, 0.0f},  {0x1p-140f, 0.0f}, {1.0f, 0.0f},    {0.7f, 1e-3f},
                            {1e-6f, 1e-3f},    {0x1p50f, 1.0f},   {0x1p51f, 0.0f}, {1e30f, 0.0f},
                            {0.0f, 0.0f},      {0.0f, 1e-3f},     {-0.5f, 1.0f},   {1e-3f, -1e-4f},
                            {1e-3f, INFINITY}, {INFINITY, 0.0f},  {NAN, 0.0f},     {1e-3f, NAN}};
  for (auto [a, b] : hyper) {
    check_threshold<float>(isa, a, b);
    check_threshold<BFloat16>(isa, a, b);
  }
}

// Where element indices pass 2^32 the key changes; tested on the kernel alone, with pointers far away.
void check_index_seam(const char* isa) {
  int id = -1;
  for (int i = 0; i < bop2nd_isa_count(); ++i) id = std::string(bop2nd_isa_name(i)) == isa ? i : id;
  if (id < 0) return;
  constexpr int64_t kStart = (int64_t{1} << 32) - 64, kSize = 128;
  for (int64_t length :
       {int64_t{1} << 33, (int64_t{1} << 32) - 13}) {  // a seam between words, and inside one
    int64_t first_word = length == (int64_t{1} << 33) ? kStart / kWordBits : words_for(length) - 1;
    int64_t n_words = length == (int64_t{1} << 33) ? kSize / kWordBits : 2;
    int64_t first_row = first_word / words_for(length);
    int64_t start = first_row * length + (first_word % words_for(length)) * kWordBits;
    Random random;
    std::vector<float> g(kSize);
    std::vector<uint32_t> w(8, 0);
    Guarded<BFloat16> m(kSize), v(kSize);
    for (float& x : g) x = random.real();
    std::memset(m.data(), 0, kSize * 2), std::memset(v.data(), 0, kSize * 2);
    auto far = [](auto* p, int64_t n) {
      return reinterpret_cast<decltype(p)>(reinterpret_cast<uintptr_t>(p) -
                                           static_cast<uintptr_t>(n) * sizeof(*p));
    };
    StepOperand t{.weight = far(w.data(), first_word),
                  .grad = far(g.data(), start),
                  .exp_avg = far(m.data(), start),
                  .exp_avg_sq = far(v.data(), start),
                  .weight_type = Dtype::kPacked,
                  .grad_type = Dtype::kFloat32,
                  .state_type = Dtype::kBFloat16,
                  .rows = 2,
                  .length = length,
                  .key = 12345};
    StepCounts counts{0, 0};
    training_of(id)->step(t, kHyper, first_word, n_words, &counts);
    int64_t n = length == (int64_t{1} << 33) ? kSize : length - start + kWordBits;
    for (int64_t e = 0; e < n; ++e) {
      float m_want = 0, v_want = 0;
      bool candidate;
      plain_rule(g[static_cast<size_t>(e)], m_want, &v_want, false, candidate);
      uint32_t bits = plain_random(12345, static_cast<uint64_t>(start + e));
      CHECK(same(m[e], rounded(m_want, BFloat16{}, bits & 0xFFFF)), "%s seam, m of %ld", isa, (long)e);
      CHECK(same(v[e], rounded(v_want, BFloat16{}, bits >> 16)), "%s seam, v of %ld", isa, (long)e);
    }
  }
}

template <class G>
void check_gradient(const char* isa) {
  for (bool second : {true, false}) {
    check_step<G, float, uint32_t>(isa, second);
    check_step<G, BFloat16, uint32_t>(isa, second);
    check_step<G, float, float>(isa, second);
    check_step<G, BFloat16, BFloat16>(isa, second);
    check_step<G, float, Float16>(isa, second);
  }
}

int main() {
  on_every_instruction_set([](const char* isa) {
    check_gradient<float>(isa);
    check_gradient<BFloat16>(isa);
    check_gradient<Float16>(isa);
    check_thresholds(isa);
    check_index_seam(isa);
  });
}
