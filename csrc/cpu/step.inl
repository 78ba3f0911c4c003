// SPDX-License-Identifier: Apache-2.0
// The optimizer step over a run of words, for any vocabulary. Per weight it moves 4 B of gradient, reads and
// writes 8 B of state (16 with the second moment) and 0.25 B of words: 20.25 B in fp32, bound by memory.
// Dense weights are read always and written only where something flips.
//
// Include inside a target region and an anonymous namespace within bop2nd.

template <class V>
struct StepConstants {
  Hyper<V> hyper;
  typename V::F scale;

  BOP2ND_INLINE explicit StepConstants(const StepHyper& h)
      : hyper{.gamma = V::setf(h.gamma),
              .sigma = V::setf(h.sigma),
              .a = V::setf(h.a),
              .b = V::setf(h.b),
              .screen = V::setf(screen_factor(h.a, h.b))},
        scale(V::setf(h.grad_scale)) {}
};

// Random bits where the upper half of the index may change between two lanes: once in 2^32 elements.
__attribute__((noinline)) inline void seam_random(uint32_t key, int64_t e, int n, uint32_t* random) {
  for (int i = 0; i < n; ++i) {
    uint64_t index = static_cast<uint64_t>(e) + static_cast<uint64_t>(i);
    uint32_t at = rounding_key_at(key, static_cast<uint32_t>(index >> 32));
    random[i] = mix32<PlainWord>(static_cast<uint32_t>(index) ^ at);
  }
}

// The random bits of elements e .. e + kLanes - 1.
template <class V>
BOP2ND_INLINE typename V::I lane_random(uint32_t key, int64_t e) {
  uint32_t low = static_cast<uint32_t>(e), high = static_cast<uint32_t>(static_cast<uint64_t>(e) >> 32);
  if (__builtin_expect(low > 0xFFFFFFFFu - V::kLanes, 0)) {
    uint32_t random[V::kLanes];
    seam_random(key, e, V::kLanes, random);
    return V::load_int(random);
  }
  return rounding_bits<V>(V::add_int(V::set1(low), V::iota()), V::set1(rounding_key_at(key, high)));
}

template <class V>
BOP2ND_INLINE void store_state(float* p, typename V::F x, typename V::I, int n) {
  V::store(p, x, n);
}

template <class V>
BOP2ND_INLINE void store_state(BFloat16* p, typename V::F x, typename V::I random16, int n) {
  V::store_low16(p, round_bf16_stochastic<V>(x, random16), n);
}

// Up to kLanes elements from e on: updates the state, returns the bits of candidates and flips.
template <class V, class G, class S, bool kSecond>
BOP2ND_INLINE Verdict<V> step_lanes(const StepOperand& t, const StepConstants<V>& c, int64_t e, int n,
                                    uint32_t negative) {
  S* m_at = static_cast<S*>(t.exp_avg) + e;
  S* v_at = kSecond ? static_cast<S*>(t.exp_avg_sq) + e : nullptr;
  typename V::F g = V::mul(V::load(static_cast<const G*>(t.grad) + e, n), c.scale);
  typename V::F m = V::load(m_at, n);
  typename V::F v = V::setf(0.0f);
  if constexpr (kSecond) v = V::load(v_at, n);
  Verdict<V> verdict = bop_rule<V, kSecond>(c.hyper, g, m, v, negative);
  typename V::I random = V::set1(0);
  if constexpr (sizeof(S) == 2) random = lane_random<V>(t.key, e);
  store_state<V>(m_at, m, V::bit_and(random, V::set1(0xFFFFu)), n);
  if constexpr (kSecond) store_state<V>(v_at, v, V::template shift_right<16>(random), n);
  return verdict;
}

struct WordBits {
  uint32_t signs, candidates, flips;
};

// Up to kLanes elements, which are bits at.. of their word; e is the index of the word's first element.
template <class V, class G, class S, class W, bool kSecond>
BOP2ND_INLINE void step_part(const StepOperand& t, const StepConstants<V>& c, int64_t e, int at, int n,
                             WordBits& word) {
  Verdict<V> verdict;
  if constexpr (std::is_void_v<W>) {
    verdict = step_lanes<V, G, S, kSecond>(t, c, e + at, n, word.signs >> at);
  } else {
    W* w_at = static_cast<W*>(t.weight) + e + at;
    typename V::F w = V::load(w_at, n);
    verdict = step_lanes<V, G, S, kSecond>(t, c, e + at, n, V::bits(V::less_zero(w)));
    if (verdict.flips & low_bits(n)) V::store(w_at, V::flip_sign(w, V::from_bits(verdict.flips)), n);
  }
  word.candidates |= verdict.candidates << at;
  word.flips |= verdict.flips << at;
}

template <class G, class S, class W, bool kSecond>
BOP2ND_INLINE void fetch_word_ahead(const StepOperand& t, int64_t e) {
  fetch_ahead(static_cast<const G*>(t.grad) + e, kWordBits);
  fetch_ahead(static_cast<const S*>(t.exp_avg) + e, kWordBits);
  if constexpr (kSecond) fetch_ahead(static_cast<const S*>(t.exp_avg_sq) + e, kWordBits);
  if constexpr (!std::is_void_v<W>) fetch_ahead(static_cast<const W*>(t.weight) + e, kWordBits);
}

// One word of n elements: 32, fewer in a tail. `packed` is where packed weights keep their signs. W is void
// for them and the element type of dense weights.
template <class V, class G, class S, class W, bool kSecond, bool kTail>
BOP2ND_INLINE void step_word(const StepOperand& t, const StepConstants<V>& c, int64_t e, int n,
                             uint32_t* packed, StepCounts& counts) {
  WordBits word{};
  if constexpr (std::is_void_v<W>) word.signs = *packed;
  if constexpr (kTail) {
#pragma GCC unroll 1
    for (int at = 0; at < n; at += V::kLanes) step_part<V, G, S, W, kSecond>(t, c, e, at, n - at, word);
  } else {
    fetch_word_ahead<G, S, W, kSecond>(t, e);
#pragma GCC unroll 4
    for (int at = 0; at < kWordBits; at += V::kLanes) {
      step_part<V, G, S, W, kSecond>(t, c, e, at, V::kLanes, word);
    }
  }
  uint32_t valid = kTail ? low_bits(n) : ~0u;
  if constexpr (std::is_void_v<W>) *packed = word.signs ^ (word.flips & valid);
  counts.candidates += __builtin_popcount(word.candidates & valid);
  counts.flips += __builtin_popcount(word.flips & valid);
}

#include "step_pairs.inl"

template <class V, class G, class S, class W, bool kSecond>
void step_words(const StepOperand& t, const StepHyper& h, int64_t first_word, int64_t n_words,
                StepCounts* counts) {
  StepConstants<V> c(h);
  StepCounts sum{};
  uint32_t* words = static_cast<uint32_t*>(t.weight);
  BitLayout row{t.length};
  int64_t row_words = row.row_words();
  for (int64_t w = first_word, end = first_word + n_words; w < end;) {
    int64_t r = w / row_words, begin = w - r * row_words;
    int64_t stop = begin + (end - w) < row_words ? begin + (end - w) : row_words;
    int64_t full = stop < t.length / kWordBits ? stop : t.length / kWordBits;
    int64_t e = r * t.length, i = begin;
    uint32_t* word = words + r * row_words;
    if constexpr (V::kPairs && std::is_void_v<W>) {
      auto run = step_pairs<V, G, kSecond>;
      if constexpr (sizeof(S) == 2) {
        bool aligned = e % kWordBits == 0;
        run = aligned ? step_pairs_bf16<V, G, kSecond, true> : step_pairs_bf16<V, G, kSecond, false>;
      }
      if (i < full) run(t, h, e + i * kWordBits, word + i, full - i, sum);
      i = i < full ? full : i;
    }
    for (; i < full; ++i) {
      step_word<V, G, S, W, kSecond, false>(t, c, e + i * kWordBits, kWordBits, word + i, sum);
    }
    if (i < stop) {
      step_word<V, G, S, W, kSecond, true>(t, c, e + i * kWordBits, row.elements_in(i), word + i, sum);
    }
    w += stop - begin;
  }
  counts->candidates += sum.candidates;
  counts->flips += sum.flips;
}

template <class V, class G, class S, bool kSecond>
void step_weight(const StepOperand& t, const StepHyper& h, int64_t first, int64_t n, StepCounts* counts) {
  switch (t.weight_type) {
    case Dtype::kPacked:
      return step_words<V, G, S, void, kSecond>(t, h, first, n, counts);
    case Dtype::kFloat32:
      return step_words<V, G, S, float, kSecond>(t, h, first, n, counts);
    case Dtype::kBFloat16:
      return step_words<V, G, S, BFloat16, kSecond>(t, h, first, n, counts);
    case Dtype::kFloat16:
      return step_words<V, G, S, Float16, kSecond>(t, h, first, n, counts);
  }
}

template <class V, class G>
void step_state(const StepOperand& t, const StepHyper& h, int64_t first, int64_t n, StepCounts* counts) {
  bool second = t.exp_avg_sq != nullptr;
  if (t.state_type == Dtype::kFloat32) {
    if (second) return step_weight<V, G, float, true>(t, h, first, n, counts);
    return step_weight<V, G, float, false>(t, h, first, n, counts);
  }
  if (second) return step_weight<V, G, BFloat16, true>(t, h, first, n, counts);
  return step_weight<V, G, BFloat16, false>(t, h, first, n, counts);
}

template <class V>
void step(const StepOperand& t, const StepHyper& h, int64_t first, int64_t n, StepCounts* counts) {
  switch (t.grad_type) {
    case Dtype::kFloat32:
      return step_state<V, float>(t, h, first, n, counts);
    case Dtype::kBFloat16:
      return step_state<V, BFloat16>(t, h, first, n, counts);
    case Dtype::kFloat16:
      return step_state<V, Float16>(t, h, first, n, counts);
    case Dtype::kPacked:
      return;
  }
}
