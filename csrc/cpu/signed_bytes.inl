// SPDX-License-Identifier: Apache-2.0
// Rows of unsigned bytes by signs, on processors without tiles: signs of some words become bytes +1 and -1 in
// the nearest cache (a panel), for all rows; then four products a lane at a time.
//
// B is a vocabulary of bytes. Sums of its own width (16 bits, where the processor multiplies pairs of bytes)
// hold a panel's 64 steps.
//
// Include inside a target region and an anonymous namespace within bop2nd, after signed_lookup.inl.

// The words of one panel, of a block: [step of 4 products][part][16 lanes of 4 bytes].
template <class B, int L>
void fill_panel(const uint32_t* w, int64_t n_words, int8_t* panel) {
  constexpr int kParts = 32 / L, kNibbles = L / 4;
  for (int64_t k = 0; k < n_words; ++k, w += 16 * kParts, panel += 8 * kParts * 64) {
    for (int lane = 0; lane < 16; lane += B::kLanes) {
      typename B::I step = B::set1(0);
#pragma GCC unroll 4
      for (int s = 0; s < kParts; ++s) {
        typename B::I read = B::load_int(w + 16 * s + lane);
        step = weights_paired(L) && s % 2 == 1 ? B::bit_xor(read, step) : read;
        auto store = [&](int q, int h, typename B::I bytes) {
          int8_t* to = panel + ((s * kNibbles + h) * kParts + q) * 64 + 4 * lane;
          B::store_int(reinterpret_cast<uint32_t*>(to), bytes);
        };
        store(0 / kNibbles, 0 % kNibbles, B::template spread_signs<0>(step));
        store(1 / kNibbles, 1 % kNibbles, B::template spread_signs<1>(step));
        store(2 / kNibbles, 2 % kNibbles, B::template spread_signs<2>(step));
        store(3 / kNibbles, 3 % kNibbles, B::template spread_signs<3>(step));
        store(4 / kNibbles, 4 % kNibbles, B::template spread_signs<4>(step));
        store(5 / kNibbles, 5 % kNibbles, B::template spread_signs<5>(step));
        store(6 / kNibbles, 6 % kNibbles, B::template spread_signs<6>(step));
        store(7 / kNibbles, 7 % kNibbles, B::template spread_signs<7>(step));
      }
    }
  }
}

// kRows rows by the lanes of kParts * 16 outputs, a panel's steps; sums in the order of lanes.
template <class B, int kParts, int kRows>
BOP2ND_INLINE void multiply_panel(const uint8_t* x, int64_t row_bytes, int64_t steps, const int8_t* panel,
                                  int32_t* sums, int64_t sum_stride, bool fresh) {
  using I = typename B::I;
  for (int lane = 0; lane < 16; lane += B::kLanes) {
    I total[kRows][kParts];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int q = 0; q < kParts; ++q) total[r][q] = B::set1(0);
    }
    const int8_t* w = panel + 4 * lane;
    for (int64_t step = 0; step < steps; ++step, w += kParts * 64) {
      I weights[kParts];
#pragma GCC unroll 4
      for (int q = 0; q < kParts; ++q)
        weights[q] = B::load_int(reinterpret_cast<const uint32_t*>(w + q * 64));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        uint32_t four;
        std::memcpy(&four, x + r * row_bytes + 4 * step, 4);
        I numbers = B::set1(four);
#pragma GCC unroll 4
        for (int q = 0; q < kParts; ++q) B::add_products(total[r][q], numbers, weights[q]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int q = 0; q < kParts; ++q) {
        uint32_t* to = reinterpret_cast<uint32_t*>(sums + r * sum_stride) + 16 * q + lane;
        I sum = B::whole(total[r][q]);
        B::store_int(to, fresh ? sum : B::add_int(sum, B::load_int(to)));
      }
    }
  }
}

template <class B, int L>
void multiply_block(const ByteWork& work, const uint32_t* w, int32_t* sums) {
  constexpr int kParts = 32 / L;
  for (int64_t k = 0; k < work.row_words; k += kBytePanelWords) {
    int64_t n = std::min(kBytePanelWords, work.row_words - k), row = 0;
    fill_panel<B, L>(w + k * 16 * kParts, n, work.panel);
    auto multiply = [&](auto rows, int64_t r) {
      multiply_panel<B, kParts, decltype(rows)::value>(work.x + r * work.row_bytes + 32 * k, work.row_bytes,
                                                       8 * n, work.panel, sums + r * work.sum_stride,
                                                       work.sum_stride, k == 0);
    };
    for (; row + B::kRows <= work.n_rows; row += B::kRows)
      multiply(std::integral_constant<int, B::kRows>{}, row);
    for (; row < work.n_rows; ++row) multiply(std::integral_constant<int, 1>{}, row);
  }
  // From the order of lanes to that of outputs.
  for (int64_t row = 0; row < work.n_rows; ++row) {
    int32_t lanes[16 * kParts], *to = sums + row * work.sum_stride;
    std::memcpy(lanes, to, sizeof(lanes));
    for (int q = 0; q < kParts; ++q) {
      for (int i = 0; i < 16; ++i) to[output_of<L>(i, q)] = lanes[16 * q + i];
    }
  }
}

template <class B>
void multiply_bytes(const ByteWork& work) {
  static_assert(8 * kBytePanelWords <= B::kSteps, "sums hold the steps of a panel");
  int32_t* sums = work.sums;
  for (int64_t block = work.first_block, n; block < work.last_block; block += n, sums += 16 * n) {
    int lane_bits = lane_bits_for(work.outputs - 16 * block);
    n = 32 / lane_bits;
    const uint32_t* w = work.w + 16 * block * work.row_words;
    if (lane_bits == 8) multiply_block<B, 8>(work, w, sums);
    if (lane_bits == 16) multiply_block<B, 16>(work, w, sums);
    if (lane_bits == 32) multiply_block<B, 32>(work, w, sums);
  }
}
