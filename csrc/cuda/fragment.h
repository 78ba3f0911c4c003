// SPDX-License-Identifier: Apache-2.0
// Which matrix element each lane of a warp holds in the registers of an mma instruction (PTX ISA, "Matrix
// Fragments for mma.m16n8k256" and "mma.m16n8k32"; A is row-major, B column-major), and how a k256 step of
// bits is decoded for the byte instruction.
//
// A lane's register of bits is 32 neighbouring k of one row, so one word of our layout (core/bit_layout.h) is
// one register. Limits: no CUDA header, compiles for host and device.
#pragma once

#include "../core/bit_layout.h"

namespace bop2nd::cuda {

struct Coordinate {
  int row, col;
};

// mma.m16n8k256.b1: D[16,8] += popcount(A[16,256] op B[256,8]) over k.
struct FragmentBits {
  static constexpr int kM = 16, kN = 8, kK = 256;
  static constexpr int kWords = kK / kWordBits;  // words of a row in one step

  BOP2ND_HD static constexpr Coordinate a(int lane, int reg, int bit) {
    return {lane / 4 + (reg % 2) * 8, (lane % 4) * 32 + (reg / 2) * 128 + bit};
  }
  BOP2ND_HD static constexpr Coordinate b(int lane, int reg, int bit) {  // row = k, col = n
    return {(lane % 4) * 32 + reg * 128 + bit, lane / 4};
  }
  BOP2ND_HD static constexpr Coordinate c(int lane, int reg) {
    return {lane / 4 + (reg / 2) * 8, (lane % 4) * 2 + reg % 2};
  }
};

// mma.m16n8k32.u8: four bytes to a register; C as above.
struct FragmentBytes {
  static constexpr int kK = 32;

  BOP2ND_HD static constexpr Coordinate a(int lane, int reg, int byte) {
    return {lane / 4 + (reg % 2) * 8, (lane % 4) * 4 + (reg / 2) * 16 + byte};
  }
  BOP2ND_HD static constexpr Coordinate b(int lane, int reg, int byte) {
    return {(lane % 4) * 4 + reg * 16 + byte, lane / 4};
  }
};

// ldmatrix.x4 reads four 8x8 matrices of 16-bit elements, so of 8 rows x 16 bytes: lane l names the address
// of row l % 8 of matrix l / 8 and receives in register j the word (l % 4) of row (l / 4) of matrix j.
struct LoadMatrix {
  static constexpr int kRows = 8, kBytes = 16;

  // A (16 rows x 8 words): matrices in the order of the registers a0..a3.
  BOP2ND_HD static constexpr Coordinate a_row(int lane) {  // row of the tile, 16-byte chunk of the step
    return {(lane / 8) % 2 * 8 + lane % 8, lane / 16};
  }
  // Two B fragments (16 outputs x 8 words): b0, b1 of outputs 0..7, then of outputs 8..15.
  BOP2ND_HD static constexpr Coordinate b_row(int lane) { return {lane / 16 * 8 + lane % 8, lane / 8 % 2}; }
};

// Chips whose bit instruction is emulated multiply bytes instead. Bits shift, shift + 8, +16 and +24 of a
// word become four bytes 0 or 1: eight k32 steps make one k256 step, and their sum is popcount(a & b). Any
// order of k will do as long as both operands share it.
constexpr int kByteSteps = 8;
BOP2ND_HD constexpr uint32_t decode_bytes(uint32_t word, int shift) { return (word >> shift) & 0x01010101u; }

// What the accumulator holds and how it becomes a count of differing bits:
//   xor: d = popc(x ^ w).   and: popc(x ^ w) = popc(x) + popc(w) - 2 popc(x & w).
enum class Math : int { kXorBits, kAndBits, kAndBytes };

// Written natively by the hardware: sm_80..sm_89 both, sm_90 only AND (XOR becomes two), later chips neither.
BOP2ND_HD constexpr Math math_of_arch(int arch) {
  return arch < 900 ? Math::kXorBits : arch < 1000 ? Math::kAndBits : Math::kAndBytes;
}

// dot = sum over k of x*w = K - 2 popc(x ^ w) = row_term + column_term + scale * accumulator
constexpr BOP2ND_HD int accumulator_scale(Math math) { return math == Math::kXorBits ? -2 : 4; }

}  // namespace bop2nd::cuda
