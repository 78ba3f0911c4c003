// SPDX-License-Identifier: Apache-2.0
// Full words of packed weights with bf16 moments. Two elements share a 32-bit lane in memory, so that a shift
// and an `and` make two fp32 vectors of it, the even and the odd elements, and a blend undoes that: no
// conversion crosses lanes. A block with infinities or NaN, for which rounding has rules of its own, and the
// seam of the random index are left to the general path.
//
// Include inside a target region and an anonymous namespace within bop2nd; step.inl does.

template <class V>
struct PairRandom {
  typename V::I even;  // lower halves of the indices of the even elements
  typename V::I key;
};

// Elements e .. e + 2 kLanes - 1, which are bits at.. of their word. False, and nothing done, if one of them
// is special.
template <class V, class G, bool kSecond>
BOP2ND_INLINE bool step_pairs(const StepTensor& t, const StepConstants<V>& c, const PairRandom<V>& r,
                              int64_t e, int at, WordBits& word) {
  using F = typename V::F;
  using I = typename V::I;
  BFloat16* m_at = static_cast<BFloat16*>(t.exp_avg) + e;
  BFloat16* v_at = kSecond ? static_cast<BFloat16*>(t.exp_avg_sq) + e : nullptr;
  F g[2], m[2], v[2] = {V::setf(0.0f), V::setf(0.0f)};
  typename V::M negative[2];
  V::load_pairs(static_cast<const G*>(t.grad) + e, g[0], g[1]);
  V::load_pairs(m_at, m[0], m[1]);
  if constexpr (kSecond) V::load_pairs(v_at, v[0], v[1]);
  V::pairs_from_bits(word.signs >> at, negative[0], negative[1]);
  Verdict<V> verdict[2];
  for (int i = 0; i < 2; ++i) {
    verdict[i] = bop_rule<V, kSecond>(c.hyper, V::mul(g[i], c.scale), m[i], v[i], negative[i]);
  }
  // Negative v, which a valid state never has, looks like an infinity here.
  I largest = V::max_int(V::as_int(V::abs(m[0])), V::as_int(V::abs(m[1])));
  if constexpr (kSecond) largest = V::max_int(largest, V::max_int(V::as_int(v[0]), V::as_int(v[1])));
  if (__builtin_expect(!V::all_below(largest, 0x7F800000u), 0)) return false;
  I m_rounded[2], v_rounded[2];  // in the high halves
  for (int i = 0; i < 2; ++i) {
    I random = rounding_bits<V>(i == 0 ? r.even : V::add_int(r.even, V::set1(1)), r.key);
    m_rounded[i] = V::add_int(V::as_int(m[i]), V::bit_and(random, V::set1(0xFFFFu)));
    if constexpr (kSecond) v_rounded[i] = V::add_int(V::as_int(v[i]), V::template shift_right<16>(random));
  }
  V::store_pairs(m_at, m_rounded[0], m_rounded[1]);
  if constexpr (kSecond) V::store_pairs(v_at, v_rounded[0], v_rounded[1]);
  word.candidates |= V::pair_bits(verdict[0].candidates, verdict[1].candidates) << at;
  word.flips |= V::pair_bits(verdict[0].flips, verdict[1].flips) << at;
  return true;
}

BOP2ND_INLINE void finish_word(const WordBits& word, uint32_t* packed, StepCounts& counts) {
  *packed = word.signs ^ word.flips;
  counts.candidates += __builtin_popcount(word.candidates);
  counts.flips += __builtin_popcount(word.flips);
}

// `n` full words, of which the first starts at element e. No call inside the inner loop, so that its
// constants stay in registers.
template <class V, class G, bool kSecond>
void step_pair_words(const StepTensor& t, const StepConstants<V>& c, int64_t e, uint32_t* packed, int64_t n,
                     StepCounts& counts) {
  constexpr int kBlock = 2 * V::kLanes;
  for (int64_t i = 0; i < n;) {
    uint64_t index = static_cast<uint64_t>(e + i * kWordBits);
    uint32_t low = static_cast<uint32_t>(index);
    int64_t seam = i + static_cast<int64_t>((0xFFFFFFFFu - low) / kWordBits);  // the first word it may be in
    PairRandom<V> r{V::add_int(V::set1(low), V::add_int(V::iota(), V::iota())),
                    V::set1(rounding_key_at(t.key, static_cast<uint32_t>(index >> 32)))};
    WordBits word{packed[i], 0, 0};
    int at = 0;
    for (int64_t stop = seam < n ? seam : n; i < stop;) {
      while (at < kWordBits && step_pairs<V, G, kSecond>(t, c, r, e + i * kWordBits + at, at, word)) {
        r.even = V::add_int(r.even, V::set1(kBlock));
        at += kBlock;
      }
      if (__builtin_expect(at < kWordBits, 0)) break;
      finish_word(word, packed + i, counts);
      if (++i == n) return;
      word = {packed[i], 0, 0}, at = 0;
    }
    for (; at < kWordBits; at += V::kLanes) {
      step_part<V, G, BFloat16, void, kSecond>(t, c, e + i * kWordBits, at, V::kLanes, word);
    }
    finish_word(word, packed + i, counts);
    ++i;
  }
}
