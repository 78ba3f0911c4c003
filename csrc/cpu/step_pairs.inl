// SPDX-License-Identifier: Apache-2.0
// Full words of packed weights, two vectors at a time. The verdict on a block is left until the next one has
// been loaded: it ends in a branch on bits, and waiting for its operands it would fill the scheduler of the
// processor, which then reaches less far ahead (AVX-512, weights in the second-level cache: 5.1 -> 4.1 ns for
// 16 weights with fp32 state, 8.6 -> 7.6 ns with bf16).
//
// bf16 moments: two elements share a 32-bit lane in memory, so that a shift and an `and` make two fp32
// vectors of it, the even and the odd elements, and a blend undoes that: no conversion crosses lanes. A block
// with infinities or NaN, for which rounding has rules of its own, is left to the general path.
//
// Cost of 16 weights with AVX-512, in instructions for its two vector ports: 8 for the rule, 6 for the
// verdict; with bf16 also 3 to unpack, 2 for infinities, 8 for random bits, 4 to round and pack.
//
// Include inside a target region and an anonymous namespace within bop2nd; step.inl does.

// The vocabulary of the rule on 2 kLanes neighbours: the lower and the upper half or, with kInterlaced, those
// of even and those of odd position. Set has them in order.
template <class V, bool kInterlaced>
struct PairLanes {
  struct F {
    typename V::F one, two;
  };
  struct M {
    typename V::M one, two;
  };
  using Set = uint32_t;
  static constexpr bool kScreens = true;
  static constexpr int kLanes = 2 * V::kLanes;

  BOP2ND_INLINE static F setf(float x) { return {V::setf(x), V::setf(x)}; }
  BOP2ND_INLINE static F add(F a, F b) { return {V::add(a.one, b.one), V::add(a.two, b.two)}; }
  BOP2ND_INLINE static F sub(F a, F b) { return {V::sub(a.one, b.one), V::sub(a.two, b.two)}; }
  BOP2ND_INLINE static F mul(F a, F b) { return {V::mul(a.one, b.one), V::mul(a.two, b.two)}; }
  BOP2ND_INLINE static F sqrt(F a) { return {V::sqrt(a.one), V::sqrt(a.two)}; }
  BOP2ND_INLINE static F abs(F a) { return {V::abs(a.one), V::abs(a.two)}; }
  BOP2ND_INLINE static M less_zero(F a) { return {V::less_zero(a.one), V::less_zero(a.two)}; }
  BOP2ND_INLINE static M greater(F a, F b) { return {V::greater(a.one, b.one), V::greater(a.two, b.two)}; }
  BOP2ND_INLINE static M not_less(F a, F b) { return {V::not_less(a.one, b.one), V::not_less(a.two, b.two)}; }
  BOP2ND_INLINE static Set bits(M a) {
    if constexpr (kInterlaced) return V::pair_bits(a.one, a.two);
    return V::bits(a.one) | V::bits(a.two) << V::kLanes;
  }
  BOP2ND_INLINE static Set same(Set a, Set b) { return ~(a ^ b) & low_bits(kLanes); }
  BOP2ND_INLINE static Set both(Set a, Set b) { return a & b; }
  BOP2ND_INLINE static bool none(Set a) { return a == 0; }

  template <class T>
  BOP2ND_INLINE static F load(const T* p) {
    if constexpr (!kInterlaced) return {V::load(p, V::kLanes), V::load(p + V::kLanes, V::kLanes)};
    F a;
    V::load_pairs(p, a.one, a.two);
    return a;
  }
  BOP2ND_INLINE static void store(float* p, F a) {
    static_assert(!kInterlaced);
    V::store(p, a.one, V::kLanes), V::store(p + V::kLanes, a.two, V::kLanes);
  }
};

// The random bits of a run of elements whose indices differ in their lowest 16 bits only. Within one the
// first third of the hash, x ^ (x >> 16), is an exclusive or with a constant. With kAligned the blocks of
// kLanes elements start at a multiple of kLanes: then the exclusive or concerns a block's start and the
// places in the block apart, and so does the multiplication that follows, which leaves one addition per
// element.
template <class V, bool kAligned>
struct RunRandom {
  using I = typename V::I;
  static constexpr uint32_t kPlaces = PairLanes<V, true>::kLanes - 1;
  uint32_t constant;
  I places[2];  // of even and of odd position

  BOP2ND_INLINE RunRandom(uint32_t index_low, uint32_t key_at)
      : constant(key_at ^ ((index_low ^ key_at) >> 16)) {
    for (uint32_t i = 0; i < 2; ++i) {
      places[i] = V::add_int(V::add_int(V::iota(), V::iota()), V::set1(i));
      if constexpr (!kAligned) continue;
      places[i] = V::mul_int(V::bit_xor(places[i], V::set1(constant & kPlaces)), V::set1(kMixFirst));
    }
  }

  // Adds the random bits of the block from `index_low` on to m and v, below the upper halves of the lanes.
  template <bool kSecond>
  BOP2ND_INLINE void add_to(uint32_t index_low, I* m, I* v) const {
    I start = V::set1(kAligned ? ((index_low ^ constant) & ~kPlaces) * kMixFirst : index_low);
    for (int i = 0; i < 2; ++i) {
      I x = V::add_int(start, places[i]);
      if constexpr (!kAligned) x = V::mul_int(V::bit_xor(x, V::set1(constant)), V::set1(kMixFirst));
      x = V::bit_xor(x, V::template shift_right<15>(x));
      x = V::mul_int(x, V::set1(kMixSecond));
      I high = V::template shift_right<16>(x);
      m[i] = V::add_int(m[i], V::xor_and(x, high, V::set1(0xFFFFu)));
      if constexpr (kSecond) v[i] = V::add_int(v[i], high);
    }
  }
};

// The arrays of some full words, from their first element on, in blocks of P::kLanes.
template <class P, class G, class S, bool kSecond>
struct PairBlocks {
  static constexpr int kPerWord = kWordBits / P::kLanes;
  StepConstants<P> c;
  const G* grad;
  S *exp_avg, *exp_avg_sq;
  uint32_t* packed;
  StepCounts counts{};  // copied at the end: they stay in registers

  BOP2ND_INLINE PairBlocks(const StepOperand& t, const StepHyper& h, int64_t e, uint32_t* words)
      : c(h),
        grad(static_cast<const G*>(t.grad) + e),
        exp_avg(static_cast<S*>(t.exp_avg) + e),
        exp_avg_sq(kSecond ? static_cast<S*>(t.exp_avg_sq) + e : nullptr),
        packed(words) {}

  // The updated moments of a block.
  BOP2ND_INLINE void update(int64_t block, typename P::F& m, typename P::F& v) const {
    int64_t at = block * P::kLanes;
    fetch_ahead(grad + at, P::kLanes), fetch_ahead(exp_avg + at, P::kLanes);
    m = P::load(exp_avg + at);
    if constexpr (kSecond) fetch_ahead(exp_avg_sq + at, P::kLanes), v = P::load(exp_avg_sq + at);
    update_moments<P, kSecond>(c.hyper, P::mul(P::load(grad + at), c.scale), m, v);
  }

  BOP2ND_INLINE void decide(int64_t block, typename P::F m, typename P::F v) {
    uint32_t* word = packed + block / kPerWord;
    int at = static_cast<int>(block % kPerWord) * P::kLanes;
    auto verdict = bop2nd::decide<P, kSecond>(c.hyper, m, v, (*word >> at) & low_bits(P::kLanes));
    counts.candidates += __builtin_popcount(verdict.candidates);
    if (__builtin_expect(verdict.flips == 0, 1)) return;
    *word ^= verdict.flips << at;
    counts.flips += __builtin_popcount(verdict.flips);
  }
};

// `n` full words with fp32 moments, of which the first starts at element e.
template <class V, class G, bool kSecond>
void step_pairs(const StepOperand& t, const StepHyper& h, int64_t e, uint32_t* packed, int64_t n,
                StepCounts& total) {
  using P = PairLanes<V, false>;
  PairBlocks<P, G, float, kSecond> blocks(t, h, e, packed);
  typename P::F m, v = P::setf(0.0f), m_before = v, v_before = v;
  int64_t n_blocks = n * blocks.kPerWord;
  for (int64_t i = 0; i < n_blocks; ++i) {
    blocks.update(i, m, v);
    P::store(blocks.exp_avg + i * P::kLanes, m);
    if constexpr (kSecond) P::store(blocks.exp_avg_sq + i * P::kLanes, v);
    if (i > 0) blocks.decide(i - 1, m_before, v_before);
    m_before = m, v_before = v;
  }
  if (n_blocks > 0) blocks.decide(n_blocks - 1, m_before, v_before);
  total.candidates += blocks.counts.candidates, total.flips += blocks.counts.flips;
}

// One block by the general path.
template <class V, class G, bool kSecond>
__attribute__((noinline)) void step_special_block(const StepOperand& t, const StepHyper& h, int64_t e, int at,
                                                  uint32_t* packed, StepCounts& counts) {
  StepConstants<V> c(h);
  WordBits word{.signs = *packed, .candidates = 0, .flips = 0};
  for (int stop = at + PairLanes<V, true>::kLanes; at < stop; at += V::kLanes) {
    step_part<V, G, BFloat16, void, kSecond>(t, c, e, at, V::kLanes, word);
  }
  *packed = word.signs ^ word.flips;
  counts.candidates += __builtin_popcount(word.candidates);
  counts.flips += __builtin_popcount(word.flips);
}

// The same with bf16 moments. No call inside the inner loop, so that its constants stay in registers.
template <class V, class G, bool kSecond, bool kAligned>
void step_pairs_bf16(const StepOperand& t, const StepHyper& h, int64_t e, uint32_t* packed, int64_t n,
                     StepCounts& total) {
  using P = PairLanes<V, true>;
  PairBlocks<P, G, BFloat16, kSecond> blocks(t, h, e, packed);
  typename P::F m, v = P::setf(0.0f), m_before = v, v_before = v;
  constexpr int kPerWord = blocks.kPerWord;
  for (int64_t i = 0, n_blocks = n * kPerWord; i < n_blocks;) {
    uint64_t index = static_cast<uint64_t>(e + i * P::kLanes);
    uint32_t low = static_cast<uint32_t>(index);
    RunRandom<V, kAligned> random(low, rounding_key_at(t.key, static_cast<uint32_t>(index >> 32)));
    int64_t run = (0x10000 - static_cast<int64_t>(low & 0xFFFFu)) / P::kLanes;  // 0: it ends in this block
    int64_t first = i, stop = i + run < n_blocks ? i + run : n_blocks;
    for (; i < stop; ++i) {
      blocks.update(i, m, v);
      // Finite if all are; where the sum itself overflows, the general path does no harm.
      typename V::F sum = V::add(m.one, m.two);
      if constexpr (kSecond) sum = V::add(sum, V::add(v.one, v.two));
      if (__builtin_expect(!V::all_finite(sum), 0)) break;
      typename V::I m_bits[2] = {V::as_int(m.one), V::as_int(m.two)};
      typename V::I v_bits[2] = {V::as_int(v.one), V::as_int(v.two)};
      random.template add_to<kSecond>(static_cast<uint32_t>(e + i * P::kLanes), m_bits, v_bits);
      V::store_pairs(blocks.exp_avg + i * P::kLanes, m_bits[0], m_bits[1]);
      if constexpr (kSecond) V::store_pairs(blocks.exp_avg_sq + i * P::kLanes, v_bits[0], v_bits[1]);
      if (i > first) blocks.decide(i - 1, m_before, v_before);
      m_before = m, v_before = v;
    }
    if (i > first) blocks.decide(i - 1, m_before, v_before);
    if (i == stop && run > 0) continue;
    int64_t word = i / kPerWord;
    int at = static_cast<int>(i % kPerWord) * P::kLanes;
    step_special_block<V, G, kSecond>(t, h, e + word * kWordBits, at, packed + word, total);
    ++i;
  }
  total.candidates += blocks.counts.candidates, total.flips += blocks.counts.flips;
}
