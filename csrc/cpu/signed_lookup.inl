// SPDX-License-Identifier: Apache-2.0
// A few rows by signs: every four numbers of a row have 16 signed sums, a table; four bits of a weight choose
// one, for all lanes by one instruction where the processor has it. Weights are read once, as bits.
//
// Cost of 32 products, of as many outputs as there are lanes: 8 look-ups, 8 shifts, 8 additions. With AVX-512
// that is 12 cycles for 64 bytes of weights.
//
// Real sums have the order of reference.signed_dots: even and odd tables side by side, then words one after
// another.
//
// Include inside a target region and an anonymous namespace within bop2nd, after matmul.inl.

template <class V>
struct RealSums {
  BOP2ND_INLINE static typename V::I add(typename V::I a, typename V::I b) {
    return V::as_int(V::add(V::as_float(a), V::as_float(b)));
  }
};
template <class V>
struct IntegerSums {
  BOP2ND_INLINE static typename V::I add(typename V::I a, typename V::I b) { return V::add_int(a, b); }
};

// Lane i of vector v of part q of a block, whose outputs have L bits of every step: see prepack_weight.
template <int L>
constexpr int output_of(int lane, int part) {
  int position = lane % 4 * (32 / L) + part;
  return 16 * (position / 4) + 4 * (lane / 4) + position % 4;
}

// One block of 512 / L outputs.
template <class V, class Sums, int L>
void look_up_block(const LookupWork& work, const uint32_t* w, uint32_t* sums) {
  constexpr int kParts = 32 / L, kVectors = 16 / V::kLanes, kNibbles = L / 4;
  using I = typename V::I;
  I total[kParts][kVectors];
#pragma GCC unroll 4
  for (int q = 0; q < kParts; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) total[q][v] = V::set1(0);
  }
  const uint32_t* tables = work.tables;
  for (int64_t k = 0; k < work.row_words; ++k, tables += 8 * 16, w += 16 * kParts) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      I steps[kParts];
#pragma GCC unroll 4
      for (int s = 0; s < kParts; ++s) {
        steps[s] = V::load_int(w + 16 * s + v * V::kLanes);
        if (weights_paired(L) && s % 2 == 1) steps[s] = V::bit_xor(steps[s], steps[s - 1]);
      }
#pragma GCC unroll 4
      for (int q = 0; q < kParts; ++q) {
        I even = V::set1(0), odd = even;
#pragma GCC unroll 8
        for (int t = 0; t < 8; ++t) {
          I& step = steps[t / kNibbles];
          I value = V::look_up(tables + 16 * t, step);
          step = V::template shift_right<4>(step);
          if (t < 2) {
            (t == 0 ? even : odd) = value;
          } else {
            I& sum = t % 2 == 0 ? even : odd;
            sum = Sums::add(sum, value);
          }
        }
        total[q][v] = Sums::add(total[q][v], Sums::add(even, odd));
      }
    }
  }
  for (int q = 0; q < kParts; ++q) {
    for (int v = 0; v < kVectors; ++v) {
      uint32_t lanes[V::kLanes];
      V::store_int(lanes, total[q][v]);
      for (int i = 0; i < V::kLanes; ++i) sums[output_of<L>(v * V::kLanes + i, q)] = lanes[i];
    }
  }
}

template <class V, template <class> class Sums>
void look_up_rows(const LookupWork& work) {
  uint32_t* sums = work.sums;
  for (int64_t block = work.first_block, n; block < work.last_block; block += n, sums += 16 * n) {
    int lane_bits = lane_bits_for(work.outputs - 16 * block);
    n = 32 / lane_bits;
    const uint32_t* w = work.w + 16 * block * work.row_words;
    if (lane_bits == 8) look_up_block<V, Sums<V>, 8>(work, w, sums);
    if (lane_bits == 16) look_up_block<V, Sums<V>, 16>(work, w, sums);
    if (lane_bits == 32) look_up_block<V, Sums<V>, 32>(work, w, sums);
  }
}
