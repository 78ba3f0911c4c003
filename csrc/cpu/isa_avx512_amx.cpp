// SPDX-License-Identifier: Apache-2.0
// As AVX-512 with BITALG, but products of enough pixels multiply tiles of bytes instead of counting bits.
#include "isa_tables.h"
#include "target.h"

#if BOP2ND_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

BOP2ND_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bitalg,avx512vbmi,gfni,f16c,popcnt,bmi,bmi2")
#include "vocabulary_amx.h"
#include "vocabulary_avx512.h"

namespace bop2nd {
namespace {

#include "matmul.inl"
#include "tiles.inl"

const TileTable kAmxTiles = {.pixels = tile_pixels<AmxTiles>,
                             .multiply = tile_multiply<AmxTiles>,
                             .order_bytes = tile_order_bytes<AmxTiles>};

}  // namespace

KernelTable avx512_amx() {
  KernelTable t = avx512_bitalg();
  t.tiles = &kAmxTiles;
  return t;
}

YardstickTable avx512_amx_yardsticks() {
  YardstickTable t = avx512_bitalg_yardsticks();
  t.register_loop = tile_register_loop<AmxTiles>;
  return t;
}

}  // namespace bop2nd
BOP2ND_TARGET_END
#endif
