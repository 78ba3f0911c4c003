// SPDX-License-Identifier: Apache-2.0
// What the loops are measured against: the same work without its memory accesses, the same memory accesses
// without the work.
//
// Include inside a target region and an anonymous namespace within bop2nd, after matmul.inl.

// The yardstick of matmul: the same counting of the longest sum that one count takes, on operands in the
// nearest cache. Returns binary multiply-accumulates (one bit each).
template <class C>
double plane_loop(int64_t iterations) {
  constexpr int kSlices = 64 * kMaxRounds;
  constexpr int P = C::kPixels;
  using Counter = CarrySaveCount<C, 8, P, false>;
  alignas(64) uint32_t x[P * kSlices], w[kSlices * 16];
  for (int i = 0; i < P * kSlices; ++i) x[i] = 0x01234567u * static_cast<uint32_t>(i + 1);
  for (int i = 0; i < kSlices * 16; ++i) w[i] = 0x89ABCDEFu * static_cast<uint32_t>(i + 1);
  typename Counter::Source s;
  for (int p = 0; p < P; ++p) s.x[p] = x + p * kSlices;
  s.w = {w, nullptr};
  typename C::I counts[P][4];
  for (int64_t i = 0; i < iterations; ++i) {
    Counter::count(s, kSlices, counts);
    for (int p = 0; p < P; ++p) {
      for (int v = 0; v < 4; ++v) C::keep_in_register(counts[p][v]);
    }
  }
  return static_cast<double>(iterations) * kSlices * P * C::kLanes * 32;
}

template <class C>
double register_loop(int64_t iterations) {
  if constexpr (C::kCountsBytes) {
    return byte_loop<C>(iterations);
  } else {
    return plane_loop<C>(iterations);
  }
}

// The yardstick of the step: reads gradient, moments and words, as far ahead as the step, writes moments and
// words. Elements of kBytes bytes; the arithmetic on them is as if they were fp32, whatever they are.
template <class V, int kBytes>
void stream_elements(const float* grad, float* m, float* v, uint32_t* words, int64_t first_word,
                     int64_t n_words) {
  constexpr int kFloats = kWordBits * kBytes / 4;  // for each word
  for (int64_t w = first_word; w < first_word + n_words; ++w) {
    uint32_t word = words[w];
    fetch_ahead(grad + w * kFloats, kFloats);
    fetch_ahead(m + w * kFloats, kFloats), fetch_ahead(v + w * kFloats, kFloats);
#pragma GCC unroll 4
    for (int64_t e = w * kFloats; e < (w + 1) * kFloats; e += V::kLanes) {
      typename V::F g = V::load(grad + e, V::kLanes);
      V::store(m + e, V::add(V::load(m + e, V::kLanes), g), V::kLanes);
      V::store(v + e, V::add(V::load(v + e, V::kLanes), g), V::kLanes);
    }
    words[w] = ~word;
  }
}

template <class V>
void stream(const float* grad, float* m, float* v, uint32_t* words, int element_bytes, int64_t first_word,
            int64_t n_words) {
  auto loop = element_bytes == 2 ? stream_elements<V, 2> : stream_elements<V, 4>;
  loop(grad, m, v, words, first_word, n_words);
}
