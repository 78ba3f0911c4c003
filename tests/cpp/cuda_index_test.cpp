// SPDX-License-Identifier: Apache-2.0
// The index arithmetic of the CUDA kernels, on the host: division, swizzle, split-K, border classes, fragment
// coordinates, and one warp executing a tile from the PTX fragment layout against a plain loop.
#include <set>

#include "cuda_host_block.h"
#include "cuda_random.h"
#include "cuda_shapes.h"

namespace bop2nd::cuda {

static void test_fast_divide() {
  for (uint32_t d :
       {1u, 2u, 3u, 5u, 7u, 9u, 32u, 33u, 49u, 100u, 3136u, 65535u, 65536u, 1000003u, 2147483647u}) {
    FastDivide by(d);
    for (uint32_t n :
         {0u, 1u, 2u, d - 1, d, d + 1, 2 * d - 1, 65537u, 123456789u, 2147483646u, 2147483647u}) {
      n &= 0x7FFFFFFFu;
      CHECK(by.quotient(n) == n / d);
      CHECK(by.remainder(n) == n % d);
    }
  }
}

static void test_swizzle() {
  std::set<int> seen;
  for (int row = 0; row < 256; ++row)
    for (int chunk = 0; chunk < 4; ++chunk) seen.insert(swizzle(row, chunk));
  CHECK(seen.size() == 1024 && *seen.begin() == 0 && *seen.rbegin() == 1023 * 16);
  for (int row = 0; row < 128; ++row)
    for (int chunk = 0; chunk < 2; ++chunk) {
      CHECK(chunk_of_step(swizzle(row, chunk), 1) == swizzle(row, chunk + 2));
      for (int rows : {8, 16, 64})
        CHECK(swizzle(row, chunk) + rows_further(rows) == swizzle(row + rows, chunk));
    }
  for (int first = 0; first < 256; first += 8)
    for (int chunk = 0; chunk < 4; ++chunk) {  // ldmatrix: 8 rows x 16 bytes in 8 different bank groups
      std::set<int> banks;
      for (int row = 0; row < 8; ++row) banks.insert(swizzle(first + row, chunk) / 16 % 8);
      CHECK(banks.size() == 8);
    }
  for (int first = 0; first < 256; first += 2) {  // copies: a quarter warp writes 2 rows x 4 chunks
    std::set<int> banks;
    for (int i = 0; i < 8; ++i) banks.insert(swizzle(first + i / 4, i % 4) / 16 % 8);
    CHECK(banks.size() == 8);
  }
  for (int cols : {32, 64, 128}) {  // staging of results: half a warp writes 16 pairs into 32 banks
    std::set<int> all;
    for (int row = 0; row < 16; ++row)
      for (int col = 0; col < cols; ++col) all.insert(result_index(row, col, cols));
    CHECK(static_cast<int>(all.size()) == 16 * cols && *all.rbegin() == 16 * cols - 1);
    for (int half = 0; half < 2; ++half) {
      std::set<int> banks;
      for (int lane = 16 * half; lane < 16 * half + 16; ++lane)
        for (int r = 0; r < 2; ++r) {
          Coordinate at = FragmentBits::c(lane, r);
          CHECK(result_index(at.row, at.col, cols) % 2 == r);  // pairs stay pairs
          banks.insert(result_index(at.row, at.col, cols) % 32);
        }
      CHECK(banks.size() == 32);
    }
  }
}

static void test_split_k() {
  for (int stages : {1, 2, 3, 7, 16, 100})
    for (int slices = 1; slices <= stages; ++slices) {
      SplitK split{stages, slices};
      CHECK(split.begin(0) == 0 && split.end(slices - 1) == stages);
      for (int s = 0; s < slices; ++s) {
        CHECK(split.end(s) > split.begin(s));
        CHECK(split.end(s) - split.begin(s) <= (stages + slices - 1) / slices);
        if (s) CHECK(split.begin(s) == split.end(s - 1));
      }
    }
  CHECK(choose_slices(200, 100, 132, 2, 4) == 1);
  CHECK(choose_slices(1, 100, 132, 2, 4) == 25);
  CHECK(choose_slices(66, 100, 132, 2, 4) == 4);
  CHECK(choose_slices(1, 3, 132, 2, 4) == 1);
}

// Two outputs of one axis in the same class see exactly the same taps in the padding.
static void test_border_classes() {
  for (int size : {1, 2, 3, 5, 8, 13})
    for (int kernel : {1, 2, 3, 5})
      for (int stride : {1, 2, 3})
        for (int padding : {0, 1, 2, 4})
          for (int dilation : {1, 2}) {
            if (size + 2 * padding < dilation * (kernel - 1) + 1) continue;
            Axis axis(conv_shape(1, {size, kernel, stride, padding, dilation}, {1, 1, 1, 0, 1}, 1, 1, 1), 0);
            CHECK(axis.out >= 1 && axis.n_classes() >= 1 && axis.n_classes() <= axis.out);
            std::set<int> classes;
            for (int o = 0; o < axis.out; ++o) {
              int c = axis.class_of(o);
              CHECK(c >= 0 && c < axis.n_classes());
              classes.insert(c);
              int twin = axis.output_of(c);
              CHECK(twin >= 0 && twin < axis.out && axis.class_of(twin) == c);
              for (int k = 0; k < kernel; ++k) {
                CHECK(axis.inside(axis.position(o, k)) == axis.inside(axis.position(twin, k)));
              }
            }
            CHECK(static_cast<int>(classes.size()) == axis.n_classes());
          }
  CHECK(conv_view(1, {56, 3, 1, 1, 1}, {1, 1, 1, 0, 1}, 1, 1, 1).vertical.n_classes() == 3);
  CHECK(conv_view(1, {56, 3, 2, 1, 1}, {1, 1, 1, 0, 1}, 1, 1, 1).vertical.n_classes() == 2);
  CHECK(conv_view(1, {56, 1, 1, 0, 1}, {1, 1, 1, 0, 1}, 1, 1, 1).vertical.n_classes() == 1);
}

static void test_conv_coordinates() {
  ConvView s = conv_view(3, {7, 3, 2, 1, 1}, {10, 2, 1, 0, 2}, 2, 70, 5);
  CHECK(s.group_words == 3 && s.k_words() == 18 && s.k_elements() == 420 && s.pixel_words() == 6);
  CHECK(s.vertical.out == 4 && s.horizontal.out == 8 && s.n_rows() == 96 && s.n_outputs() == 10);
  int row = 0;
  for (int n = 0; n < 3; ++n)
    for (int y = 0; y < 4; ++y)
      for (int x = 0; x < 8; ++x, ++row) {
        Pixel p = s.pixel(row);
        CHECK(p.image == n && p.y == y && p.x == x);
        for (int ky = 0; ky < 3; ++ky)
          for (int kx = 0; kx < 2; ++kx) {
            int iy = y * 2 - 1 + ky, ix = x + kx * 2;
            bool inside = iy >= 0 && iy < 7 && ix >= 0 && ix < 10;
            CHECK(s.input_pixel(p, ky, kx) == (inside ? (n * 7 + iy) * 10 + ix : -1));
          }
      }
  int k = 0;
  for (int ky = 0; ky < 3; ++ky)
    for (int kx = 0; kx < 2; ++kx)
      for (int word = 0; word < 3; ++word, ++k) {
        Tap t = s.tap(k);
        CHECK(t.ky == ky && t.kx == kx && t.word == word);
      }
}

// Every element of A, B and C belongs to exactly one (lane, register, bit).
static void test_fragments_cover() {
  std::set<int> a, b, c, ab, bb;
  for (int lane = 0; lane < 32; ++lane) {
    for (int bit = 0; bit < 32; ++bit) {
      for (int r = 0; r < 4; ++r)
        a.insert(FragmentBits::a(lane, r, bit).row * 256 + FragmentBits::a(lane, r, bit).col);
      for (int r = 0; r < 2; ++r)
        b.insert(FragmentBits::b(lane, r, bit).col * 256 + FragmentBits::b(lane, r, bit).row);
    }
    for (int byte = 0; byte < 4; ++byte) {
      for (int r = 0; r < 4; ++r)
        ab.insert(FragmentBytes::a(lane, r, byte).row * 32 + FragmentBytes::a(lane, r, byte).col);
      for (int r = 0; r < 2; ++r)
        bb.insert(FragmentBytes::b(lane, r, byte).col * 32 + FragmentBytes::b(lane, r, byte).row);
    }
    for (int r = 0; r < 4; ++r) c.insert(FragmentBits::c(lane, r).row * 8 + FragmentBits::c(lane, r).col);
  }
  CHECK(a.size() == 16 * 256 && b.size() == 8 * 256 && c.size() == 16 * 8 && ab.size() == 16 * 32 &&
        bb.size() == 8 * 32);
}

// ldmatrix of a tile of words gives each lane the registers that mma.m16n8k256 expects.
static void test_load_matrix() {
  Random random(3);
  HostBlock block(16 * 64 + 16 * 64);
  std::vector<uint32_t> left = random.words(16 * 8), right = random.words(16 * 8);
  for (int row = 0; row < 16; ++row)
    for (int word = 0; word < 8; ++word) {
      *block.shared<uint32_t>(swizzle(row, word / 4) + word % 4 * 4) = left[row * 8 + word];
      *block.shared<uint32_t>(1024 + swizzle(row, word / 4) + word % 4 * 4) = right[row * 8 + word];
    }
  struct Registers {
    uint32_t a[4], b[4];
  };
  HostBlock::Threads<Registers, 32> lanes;
  block.load_matrix(
      lanes, [](int t) { return swizzle(LoadMatrix::a_row(t).row, LoadMatrix::a_row(t).col); },
      [](Registers& r) { return r.a; });
  block.load_matrix(
      lanes, [](int t) { return 1024 + swizzle(LoadMatrix::b_row(t).row, LoadMatrix::b_row(t).col); },
      [](Registers& r) { return r.b; });
  for (int lane = 0; lane < 32; ++lane)
    for (int bit = 0; bit < 32; ++bit) {
      for (int r = 0; r < 4; ++r) {
        Coordinate at = FragmentBits::a(lane, r, bit);
        CHECK(((lanes.of[lane].a[r] >> bit) & 1) == ((left[at.row * 8 + at.col / 32] >> at.col % 32) & 1));
        at = FragmentBits::b(lane, r % 2, bit);
        int output = r / 2 * 8 + at.col;
        CHECK(((lanes.of[lane].b[r] >> bit) & 1) == ((right[output * 8 + at.row / 32] >> at.row % 32) & 1));
      }
    }
}

// One warp, one tile: the three kinds of arithmetic agree with a plain loop over words.
static void test_warp_tile() {
  Random random(11);
  std::vector<uint32_t> left = random.words(16 * 8), right = random.words(8 * 8);
  uint32_t a[32][4], b[32][2];
  for (int lane = 0; lane < 32; ++lane) {
    for (int r = 0; r < 4; ++r)
      a[lane][r] = left[FragmentBits::a(lane, r, 0).row * 8 + FragmentBits::a(lane, r, 0).col / 32];
    for (int r = 0; r < 2; ++r)
      b[lane][r] = right[FragmentBits::b(lane, r, 0).col * 8 + FragmentBits::b(lane, r, 0).row / 32];
  }
  int32_t with_xor[32][4] = {}, with_and[32][4] = {}, with_bytes[32][4] = {};
  emulate_mma_bits(false, a, b, with_xor);
  emulate_mma_bits(true, a, b, with_and);
  for (int shift = 0; shift < kByteSteps; ++shift) {
    uint32_t da[32][4], db[32][2];
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < 4; ++r) da[lane][r] = decode_bytes(a[lane][r], shift);
      for (int r = 0; r < 2; ++r) db[lane][r] = decode_bytes(b[lane][r], shift);
    }
    emulate_mma_bytes(da, db, with_bytes);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int r = 0; r < 4; ++r) {
      Coordinate at = FragmentBits::c(lane, r);
      int differing = 0, common = 0, of_row = 0, of_col = 0;
      for (int word = 0; word < 8; ++word) {
        uint32_t x = left[at.row * 8 + word], w = right[at.col * 8 + word];
        differing += __builtin_popcount(x ^ w);
        common += __builtin_popcount(x & w);
        of_row += __builtin_popcount(x);
        of_col += __builtin_popcount(w);
      }
      CHECK(with_xor[lane][r] == differing);
      CHECK(with_and[lane][r] == common);
      CHECK(with_bytes[lane][r] == common);
      int dot = 256 - 2 * differing;
      CHECK(dot == 256 + accumulator_scale(Math::kXorBits) * with_xor[lane][r]);
      CHECK(dot == 256 - 2 * of_row - 2 * of_col + accumulator_scale(Math::kAndBits) * with_and[lane][r]);
    }
  CHECK(math_of_arch(800) == Math::kXorBits && math_of_arch(890) == Math::kXorBits);
  CHECK(math_of_arch(900) == Math::kAndBits);
  CHECK(math_of_arch(1000) == Math::kAndBytes && math_of_arch(1200) == Math::kAndBytes);
}

int run_all() {
  test_fast_divide();
  test_swizzle();
  test_split_k();
  test_border_classes();
  test_conv_coordinates();
  test_fragments_cover();
  test_load_matrix();
  test_warp_tile();
  return report("cuda index arithmetic");
}

}  // namespace bop2nd::cuda

int main() { return bop2nd::cuda::run_all(); }
