// SPDX-License-Identifier: Apache-2.0
// Loops over real numbers for the runtime (RealTable in kernels.h). Included inside a target region.
//
// `multiply`: kRealPixels pixels by kRealVectors vectors of outputs are held in registers; one step loads the
// weights of all outputs and one number of every pixel: 24 multiply-adds for 10 loads with 32 registers, 12
// for 8 with 16. The sum runs over k in order: its error is at most (n_k + 1) 2^-24 sum |x w|.

template <class V, int kPixels, int kVectors>
void multiply_pixels(const RealTile& t, int64_t first) {
  using F = typename V::F;
  const float* pixels[kPixels];
  F sums[kPixels][kVectors];
#pragma GCC unroll 8  // as below: else the sums would live in memory
  for (int v = 0; v < kVectors; ++v) {
    F start = V::setf(0.0f);
    if (t.bias) start = V::load(t.bias + v * V::kLanes, static_cast<int>(t.n_outputs) - v * V::kLanes);
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) sums[p][v] = start;
  }
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) pixels[p] = t.x + t.pixel[first + p];
  const float* w = t.w;
  for (int64_t k = 0; k < t.n_k; ++k, w += V::kRealVectors * V::kLanes) {
    int64_t offset = t.k_offset[k];
    F weights[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) weights[v] = V::load(w + v * V::kLanes, V::kLanes);
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
      F x = V::setf(pixels[p][offset]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[p][v] = V::fma(x, weights[v], sums[p][v]);
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
    float* to = t.to + (first + p) * t.to_stride;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      V::store(to + v * V::kLanes, sums[p][v], static_cast<int>(t.n_outputs) - v * V::kLanes);
  }
}

template <class V, int kVectors>
void multiply_outputs(const RealTile& t) {
  constexpr int kPixels = V::kRealPixels;
  int64_t p = 0;
  for (; p + kPixels <= t.n_pixels; p += kPixels) multiply_pixels<V, kPixels, kVectors>(t, p);
  if (p + 4 <= t.n_pixels) multiply_pixels<V, 4, kVectors>(t, p), p += 4;
  if (p + 2 <= t.n_pixels) multiply_pixels<V, 2, kVectors>(t, p), p += 2;
  if (p < t.n_pixels) multiply_pixels<V, 1, kVectors>(t, p);
}

template <class V>
void multiply_reals(const RealTile& t) {
  static_assert(V::kRealVectors <= 4 && V::kRealPixels < 8, "remainders are made of 4, 2 and 1");
  int64_t vectors = (t.n_outputs + V::kLanes - 1) / V::kLanes;
  if (vectors == 1) return multiply_outputs<V, 1>(t);
  if constexpr (V::kRealVectors == 4) {
    if (vectors == 3) return multiply_outputs<V, 3>(t);
    if (vectors == 4) return multiply_outputs<V, 4>(t);
  }
  multiply_outputs<V, 2>(t);
}

template <class V, class Step>
BOP2ND_INLINE void over_window(const RealWindow& t, float start) {
  for (int64_t c = 0; c < t.n; c += V::kLanes) {
    int n = t.n - c < V::kLanes ? static_cast<int>(t.n - c) : V::kLanes;
    typename V::F sum = t.bias ? V::load(t.bias + c, n) : V::setf(start);
    for (int64_t tap = 0; tap < t.n_taps; ++tap)
      sum = Step::take(t, sum, V::load(t.x + t.offset[tap] + c, n), tap, c, n);
    V::store(t.to + c, sum, n);
  }
}

template <class V>
struct MaxStep {
  using F = typename V::F;
  BOP2ND_INLINE static F take(const RealWindow&, F most, F x, int64_t, int64_t, int) {
    F larger = V::as_float(V::select(V::greater(x, most), V::as_int(x), V::as_int(most)));
    return V::as_float(V::select(V::at_most(x, x), V::as_int(larger), V::as_int(x)));  // NaN stays
  }
};

template <class V>
struct SumStep {
  using F = typename V::F;
  BOP2ND_INLINE static F take(const RealWindow&, F sum, F x, int64_t, int64_t, int) { return V::add(sum, x); }
};

template <class V>
struct ProductStep {
  using F = typename V::F;
  BOP2ND_INLINE static F take(const RealWindow& t, F sum, F x, int64_t tap, int64_t c, int n) {
    return V::fma(x, V::load(t.w + t.w_offset[tap] + c, n), sum);
  }
};

template <class V>
void window_max(const RealWindow& t) {
  over_window<V, MaxStep<V>>(t, -__builtin_inff());
}

template <class V>
void window_sum(const RealWindow& t) {
  over_window<V, SumStep<V>>(t, 0.0f);
}

template <class V>
void window_products(const RealWindow& t) {
  over_window<V, ProductStep<V>>(t, 0.0f);
}

// The compiler makes vectors of these: steps are 0 or 1, and known inside of each loop.
template <class Function>
BOP2ND_INLINE void each_pair(int64_t n, const float* a, int64_t a_step, const float* b, int64_t b_step,
                             float* to, const Function& function) {
  if (a_step == 1 && b_step == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = function(a[i], b[i]);
  } else if (a_step == 1) {
    float other = *b;
    for (int64_t i = 0; i < n; ++i) to[i] = function(a[i], other);
  } else {
    float other = *a;
    for (int64_t i = 0; i < n; ++i) to[i] = function(other, b[i * b_step]);
  }
}

inline void binary_reals(RealOperation operation, int64_t n, const float* a, int64_t a_step, const float* b,
                         int64_t b_step, float alpha, float* to) {
  switch (operation) {
    case RealOperation::kAdd:
      return each_pair(n, a, a_step, b, b_step, to, [alpha](float x, float y) { return x + alpha * y; });
    case RealOperation::kSub:
      return each_pair(n, a, a_step, b, b_step, to, [alpha](float x, float y) { return x - alpha * y; });
    case RealOperation::kMul:
      return each_pair(n, a, a_step, b, b_step, to, [](float x, float y) { return x * y; });
    case RealOperation::kDiv:
      return each_pair(n, a, a_step, b, b_step, to, [](float x, float y) { return x / y; });
    case RealOperation::kPrelu:
      return each_pair(n, a, a_step, b, b_step, to, [](float x, float y) { return x > 0 ? x : x * y; });
  }
}

template <bool fused>
void affine_reals(int64_t n, const float* x, int64_t x_step, const float* scale, const float* shift,
                  int64_t channel_step, float* to) {
  auto one = [](float v, float a, float b) { return fused ? __builtin_fmaf(v, a, b) : v * a + b; };
  if (x_step == 1 && channel_step == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = one(x[i], scale[i], shift[i]);
  } else {
    for (int64_t i = 0; i < n; ++i)
      to[i] = one(x[i * x_step], scale[i * channel_step], shift[i * channel_step]);
  }
}

inline void clamp_reals(int64_t n, const float* x, int64_t x_step, float low, float high, float* to) {
  auto one = [low, high](float v) { return v < low ? low : v > high ? high : v; };
  if (x_step == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = one(x[i]);
  } else {
    std::fill(to, to + n, one(*x));
  }
}

template <class V>
const RealTable kRealTable = {.block = V::kRealVectors * V::kLanes,
                              .multiply = multiply_reals<V>,
                              .window_max = window_max<V>,
                              .window_sum = window_sum<V>,
                              .window_products = window_products<V>,
                              .binary = binary_reals,
                              .affine = affine_reals<false>,
                              .fused_affine = affine_reals<true>,
                              .clamp = clamp_reals};
