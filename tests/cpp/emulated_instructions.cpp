// SPDX-License-Identifier: Apache-2.0
#include "emulated_instructions.h"

#include "cpu/dispatch.h"
#include "cpu/target.h"

#if BOP2ND_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

BOP2ND_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,f16c,popcnt,bmi,bmi2")
#include "cpu/vocabulary_avx512.h"
#include "cpu/vocabulary_tiles.h"

namespace bop2nd {
namespace {

#include "cpu/matmul.inl"
#include "cpu/tiles.inl"

struct EmulatedCount : Avx512Count {
  template <int kPlane>
  BOP2ND_INLINE static I byte_counts(I a) {
    return _mm512_slli_epi32(Avx512Count::byte_counts<0>(a), kPlane);
  }
};

void emulated_multiply(const CountTile& t, const MatmulTile& block, const Epilogue& e) {
  multiply<EmulatedCount>(t, block, e);
}

// Tile registers in memory, in plain arithmetic. They exist between configure and release only.
struct EmulatedTiles : Avx512Tiles {
  struct Registers {
    bool configured = false;
    int8_t bytes[8][kTileBytes];
  };
  static Registers& registers() {
    static thread_local Registers all;
    return all;
  }
  static int8_t* tile(int i) {
    if (!registers().configured) __builtin_trap();
    return registers().bytes[i];
  }

  template <int t>
  static void store_row(int8_t* rows, Words words) {
    int8_t bytes[64];
    std::memcpy(bytes, &words, sizeof(bytes));
    for (int i = 0; i < 64; ++i) rows[64 * t + i] = (bytes[i] >> t) & 1 ? -1 : 1;
  }
  static void store_pixels(int8_t* to, const uint32_t* x) {
    store_pixel(to, x[0], ~0u);
    store_pixel(to + 32, x[1], ~0u);
  }
  static void store_pixel(int8_t* to, uint32_t word, uint32_t valid) {
    for (int t = 0; t < 8; ++t) {
      for (int k = 0; k < 4; ++k)
        to[4 * t + k] = !((valid >> (4 * t + k)) & 1) ? 0 : (word >> (8 * k + t)) & 1 ? -1 : 1;
    }
  }

  static void order_bytes(int8_t* bytes) {
    int8_t from[64];
    std::memcpy(from, bytes, 64);
    for (int i = 0; i < 64; ++i) bytes[i] = from[i / 32 * 32 + 8 * (i % 4) + i % 32 / 4];
  }

  static void configure() { registers().configured = true; }
  static void release() { registers().configured = false; }
  template <int kTile>
  static void zero() {
    std::memset(tile(kTile), 0, kTileBytes);
  }
  template <int kTile>
  static void load_tile(const void* from, int64_t stride) {
    for (int64_t r = 0; r < kTileRows; ++r)
      std::memcpy(tile(kTile) + 64 * r, static_cast<const int8_t*>(from) + r * stride, 64);
  }
  template <int kTile>
  static void store_tile(int32_t* to) {
    std::memcpy(to, tile(kTile), kTileBytes);
  }
  template <int kSum, int kX, int kW>
  static void multiply() {
    int32_t sums[kTileRows][16];
    std::memcpy(sums, tile(kSum), kTileBytes);
    for (int m = 0; m < kTileRows; ++m) {
      for (int n = 0; n < 16; ++n) {
        for (int k = 0; k < 64; ++k)
          sums[m][n] += tile(kX)[64 * m + k] * tile(kW)[k / 4 * 64 + 4 * n + k % 4];
      }
    }
    std::memcpy(tile(kSum), sums, kTileBytes);
  }
};

const TileTable kEmulatedTiles = {tile_pixels<EmulatedTiles>, tile_multiply<EmulatedTiles>,
                                  tile_order_bytes<EmulatedTiles>};

}  // namespace
}  // namespace bop2nd
BOP2ND_TARGET_END

const bop2nd::KernelTable* emulated_amx_table() {
  const bop2nd::KernelTable* base = bop2nd::table_of(bop2nd::id_of("avx512"));
  if (!base) return nullptr;
  static bop2nd::KernelTable table = *base;
  table.tiles = &bop2nd::kEmulatedTiles;
  return &table;
}

const bop2nd::KernelTable* emulated_bitalg_table() {
  const bop2nd::KernelTable* base = bop2nd::table_of(bop2nd::id_of("avx512"));
  if (!base) return nullptr;
  static bop2nd::KernelTable table = *base;
  table.multiply = bop2nd::emulated_multiply;
  return &table;
}
#else
const bop2nd::KernelTable* emulated_bitalg_table() { return nullptr; }
const bop2nd::KernelTable* emulated_amx_table() { return nullptr; }
#endif
