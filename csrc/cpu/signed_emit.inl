// SPDX-License-Identifier: Apache-2.0
// What becomes of sums of real numbers and of 8-bit integers: the epilogue on rows of them. And int8 rows of
// real ones.
//
// Include inside a target region and an anonymous namespace within bop2nd, after signed_bytes.inl.

template <class L>
BOP2ND_INLINE typename L::F clamp_reals(typename L::F x, const Epilogue& e) {
  if (e.low != INT32_MIN) {
    typename L::F least = L::setf(static_cast<float>(e.low));
    x = choose<L>(L::greater(least, x), least, x);
  }
  if (e.high == INT32_MAX) return x;
  typename L::F most = L::setf(static_cast<float>(e.high));
  return choose<L>(L::greater(x, most), most, x);
}

// What products give before the epilogue, of some outputs; `dot` becomes the exact dot of integers.
template <class C, bool kReal>
BOP2ND_INLINE typename C::Lanes::F number_of(typename C::I& dot, int32_t multiplier,
                                             const int32_t* correction) {
  using L = typename C::Lanes;
  if constexpr (kReal) return L::add(L::as_float(dot), L::setf(0.0f));  // no sum is -0
  if (multiplier != 1) dot = L::mul_int(dot, C::set1(static_cast<uint32_t>(multiplier)));
  if (correction) dot = C::add(dot, C::load(reinterpret_cast<const uint32_t*>(correction)));
  return C::real(dot);
}

// Values as they are.
template <class C, class T, bool kReal>
void emit_signed_values(const SignedRows& rows, T* values) {
  const uint32_t* sums = static_cast<const uint32_t*>(rows.sums);
  T* to = values + rows.first_pixel * rows.all_outputs + rows.first_output;
  for (int64_t r = 0; r < rows.n_rows; ++r, sums += rows.sum_stride, to += rows.all_outputs) {
    const int32_t* correction = rows.correction ? rows.correction[r] + rows.first_output : nullptr;
    for (int64_t o = 0; o < rows.n_outputs; o += C::kLanes) {
      int left = static_cast<int>(std::min<int64_t>(C::kLanes, rows.n_outputs - o));
      typename C::I dot = C::load(sums + o);
      C::Lanes::store(to + o,
                      number_of<C, kReal>(dot, rows.multiplier, correction ? correction + o : nullptr), left);
    }
  }
}

// Sign words alone: of sums compared with thresholds, or with a shift added.
template <class C, bool kReal>
void emit_signed_bits(const SignedRows& rows, const Epilogue& e) {
  using L = typename C::Lanes;
  const uint32_t* sums = static_cast<const uint32_t*>(rows.sums);
  for (int64_t r = 0; r < rows.n_rows; ++r, sums += rows.sum_stride) {
    const int32_t* correction = rows.correction ? rows.correction[r] + rows.first_output : nullptr;
    for (int64_t o = 0; o < rows.n_outputs; o += 16) {
      uint32_t bits = 0;
      int left = static_cast<int>(std::min<int64_t>(16, rows.n_outputs - o));
      for (int lane = 0; lane < left; lane += C::kLanes) {
        int64_t channel = rows.first_output + o + lane;
        typename C::I dot = C::load(sums + o + lane);
        typename L::F x =
            number_of<C, kReal>(dot, rows.multiplier, correction ? correction + o + lane : nullptr);
        if (e.threshold) {
          bits |= C::less(dot, e.threshold + channel, left - lane) << lane;
        } else {
          x = L::add(x, L::load(e.sign_shift + channel, left - lane));
          bits |= L::bits(L::less_zero(x)) << lane;
        }
      }
      store_signs(e, rows.first_pixel + r, rows.first_output + o, left, rows.all_outputs, bits);
    }
  }
}

template <class C, class T, bool kReal>
void emit_signed_rows(const SignedRows& rows, Epilogue e) {
  if (e.only_values() && !rows.input_scale)
    return emit_signed_values<C, T, kReal>(rows, static_cast<T*>(e.values));
  Epilogue rest = e;
  rest.threshold = nullptr, rest.sign_shift = nullptr;
  if (!e.values && !rows.input_scale && (e.threshold || e.sign_shift) && !rest.computes())
    return emit_signed_bits<C, kReal>(rows, e);
  using L = typename C::Lanes;
  const uint32_t* sums = static_cast<const uint32_t*>(rows.sums);
  for (int64_t r = 0; r < rows.n_rows; ++r, sums += rows.sum_stride) {
    int64_t pixel = rows.first_pixel + r;
    const int32_t* correction = rows.correction ? rows.correction[r] + rows.first_output : nullptr;
    const float* input_scale = rows.input_scale ? rows.input_scale[r] : nullptr;
    typename L::F factor = L::setf(input_scale ? *input_scale : 1.0f);
    for (int64_t o = 0; o < rows.n_outputs; o += 16) {
      uint32_t bits = 0;
      int left = static_cast<int>(std::min<int64_t>(16, rows.n_outputs - o));
      for (int lane = 0; lane < left; lane += C::kLanes) {
        int64_t channel = rows.first_output + o + lane, at = pixel * rows.all_outputs + channel;
        typename C::I dot = C::load(sums + o + lane);
        typename L::F x =
            number_of<C, kReal>(dot, rows.multiplier, correction ? correction + o + lane : nullptr);
        x = clamp_reals<L>(x, e);
        if (input_scale) x = L::mul(x, factor);
        auto below = [&] { return C::less(dot, e.threshold + channel, left - lane); };
        bits |= finish_lanes<L, T, true>(e, x, at, channel, left - lane, below) << lane;
      }
      if (e.signs) store_signs(e, pixel, rows.first_output + o, left, rows.all_outputs, bits);
    }
  }
}

template <class C, bool kReal>
void emit_signed(const SignedRows& rows, const Epilogue& e) {
  if (e.dtype == Dtype::kBFloat16) return emit_signed_rows<C, BFloat16, kReal>(rows, e);
  if (e.dtype == Dtype::kFloat16) return emit_signed_rows<C, Float16, kReal>(rows, e);
  emit_signed_rows<C, float, kReal>(rows, e);
}

// Infinity and NaN are larger than any number as bits.
inline float largest_of(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7FFFFFFFu;
    most = bits > most ? bits : most;
  }
  float result;
  std::memcpy(&result, &most, 4);
  return result;
}

// clamp(round(x / scale), -127, 127), halves to even: adding 1.5 * 2^23 leaves no bits below 1.
inline void quantize_row(const float* x, int64_t n, float scale, int8_t* to) {
  if (scale == 0.0f) {
    for (int64_t i = 0; i < n; ++i) to[i] = 0;
    return;
  }
  constexpr float kWhole = 12582912.0f;
  for (int64_t i = 0; i < n; ++i) {
    float q = x[i] / scale;
    q = q > 127.0f ? 127.0f : q < -127.0f ? -127.0f : q;
    float whole = (q + kWhole) - kWhole;
    to[i] = static_cast<int8_t>(static_cast<int32_t>(whole));
  }
}

template <class C, class B>
constexpr SignedTable kSignedTable = {.look_up_reals = look_up_rows<typename C::Lanes, RealSums>,
                                      .look_up_integers = look_up_rows<typename C::Lanes, IntegerSums>,
                                      .multiply_bytes = multiply_bytes<B>,
                                      .emit_reals = emit_signed<C, true>,
                                      .emit_integers = emit_signed<C, false>,
                                      .largest = largest_of,
                                      .quantize = quantize_row};
