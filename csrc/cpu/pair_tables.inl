// SPDX-License-Identifier: Apache-2.0
// What lookup.inl and lookup_bytes.inl share: the tables, and the activations that choose among them.
//
// Include inside a target region and an anonymous namespace within bop2nd.

constexpr int kNibblesPerWord = 8, kWindow = 3;
constexpr int kMaxWindows = 21;  // 21 * 12 <= 255: as many as P and Q hold
// Words of weights that are laid out at a time, whole windows of them: 20 KiB, which stay in the nearest
// cache.
constexpr int kPanelWords = 39, kPanelNibbles = kPanelWords * kNibblesPerWord;
static_assert(kPanelNibbles % kWindow == 0);

struct PairTables {
  alignas(64) uint8_t entry[256][16];  // [a + 16 b][w]

  constexpr PairTables() : entry{} {
    constexpr uint8_t kBits[16] = {0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4};
    for (int pair = 0; pair < 256; ++pair) {
      for (int w = 0; w < 16; ++w) {
        entry[pair][w] = static_cast<uint8_t>(kBits[(pair & 15) ^ w] + 16 * kBits[(pair >> 4) ^ w]);
      }
    }
  }
};
constexpr PairTables kPairTables;

inline bool lookups_pay(int64_t n_pixels, int lane_bits) { return n_pixels > 3 && lane_bits < 32; }

// The nibbles of two pixels, as offsets of their tables in units of 8 bytes, and room to fill a window.
constexpr int64_t pair_stride(int64_t x_words) { return (x_words + 1) * kNibblesPerWord; }

template <class T>
void pack_pixel_pairs(const PixelTile& t) {
  uint16_t* to = reinterpret_cast<uint16_t*>(t.slices);
  for (int64_t p = 0; p < t.n_pixels; p += 2, to += pair_stride(t.x_words)) {
    const uint32_t* a = t.image + t.first_word[p];
    const uint32_t* b = p + 1 < t.n_pixels ? t.image + t.first_word[p + 1] : a;
    uint16_t* nibble = to;
    for (int64_t run = 0; run < t.n_runs; ++run) {
      const uint32_t *from_a = a + t.run_offset[run], *from_b = b + t.run_offset[run];
      for (int64_t k = 0; k < t.run_words; k += 4) {
        int n = static_cast<int>(std::min<int64_t>(4, t.run_words - k));
        T::store_offsets(nibble + k * kNibblesPerWord, T::load_words(from_a + k, n),
                         T::load_words(from_b + k, n));
      }
      nibble += t.run_words * kNibblesPerWord;
    }
    for (int i = 0; i < kWindow; ++i) nibble[i] = 0;
  }
}
