// SPDX-License-Identifier: Apache-2.0
// The bodies of the CUDA product kernels, executed by emulated blocks and compared with plain loops over
// elements: whole matrix and convolution tiles, every kind of arithmetic, padding value, split of k, output.
#include "../../csrc/cuda/launch.h"
#include "cuda_random.h"
#include "cuda_shapes.h"

namespace bop2nd::cuda {
namespace {

struct Operands {
  ConvView shape;
  std::vector<uint32_t> x, w;
  std::vector<int32_t> threshold;
  std::vector<float> scale, shift, slope, post_shift, sign_shift, residual;

  Operands(const ConvView& s, uint64_t seed) : shape(s) {
    Random random(seed);
    x = random.words(static_cast<size_t>(s.n_images) * s.vertical.size * s.horizontal.size * s.pixel_words());
    w = random.words(static_cast<size_t>(s.n_outputs()) * s.k_words());
    clear_tails(&x);
    clear_tails(&w);
    for (int o = 0; o < s.n_outputs(); ++o) {
      threshold.push_back(random.below(21) - 10);
      scale.push_back(random.uniform());
      shift.push_back(random.uniform() * 4);
      slope.push_back(random.uniform());
      post_shift.push_back(random.uniform() * 4);
      sign_shift.push_back(random.uniform() * 4);
    }
    for (int64_t i = 0; i < static_cast<int64_t>(s.n_rows()) * s.n_outputs(); ++i)
      residual.push_back(random.uniform() * 8);
  }
  void clear_tails(std::vector<uint32_t>* words) const {
    for (size_t i = 0; i < words->size(); ++i) {
      int word = static_cast<int>(i % static_cast<size_t>(shape.group_words));
      (*words)[i] &= low_bits(BitLayout{shape.group_channels}.elements_in(word));
    }
  }
  static int sign(const std::vector<uint32_t>& words, size_t first, int element) {
    return (words[first + static_cast<size_t>(element / 32)] >> (element % 32)) & 1 ? -1 : 1;
  }
  // Straight from the definition, element by element.
  int dot(int row, int output) const {
    const ConvView& s = shape;
    int group = output / s.group_outputs, sum = 0;
    int image = row / (s.vertical.out * s.horizontal.out), rest = row % (s.vertical.out * s.horizontal.out);
    for (int ky = 0; ky < s.vertical.kernel; ++ky)
      for (int kx = 0; kx < s.horizontal.kernel; ++kx) {
        int y = rest / s.horizontal.out * s.vertical.stride - s.vertical.padding + ky * s.vertical.dilation;
        int x_at =
            rest % s.horizontal.out * s.horizontal.stride - s.horizontal.padding + kx * s.horizontal.dilation;
        bool inside = y >= 0 && y < s.vertical.size && x_at >= 0 && x_at < s.horizontal.size;
        int64_t pixel = (static_cast<int64_t>(image) * s.vertical.size + y) * s.horizontal.size + x_at;
        size_t x_first = inside ? static_cast<size_t>((pixel * s.groups + group) * s.group_words) : 0;
        size_t w_first =
            static_cast<size_t>(output * s.k_words() + (ky * s.horizontal.kernel + kx) * s.group_words);
        for (int c = 0; c < s.group_channels; ++c) {
          sum += (inside ? sign(x, x_first, c) : s.padding_value) * sign(w, w_first, c);
        }
      }
    return sum;
  }
};

// All outputs of one problem, checked against the definition. `n_multiprocessors` steers tile and split,
// `seed` which operands a fused epilogue has.
void check(ConvView shape, int padding_value, int arch, int n_multiprocessors, Dtype type, bool fused,
           uint64_t seed) {
  shape.padding_value = padding_value;
  Operands operands(shape, seed);
  MatmulPlan plan = plan_matmul(shape, {arch, n_multiprocessors});
  std::vector<int32_t> scratch(static_cast<size_t>(plan.scratch_words()) + 4, -77);
  for (int64_t i = plan.zero_begin(); i < plan.scratch_words(); ++i) scratch[static_cast<size_t>(i)] = 0;
  size_t n = operands.residual.size(), row_words = static_cast<size_t>(words_for(shape.n_outputs()));
  bool half = type != Dtype::kFloat32;
  std::vector<float> values(n, -12345.0f), residual = operands.residual;
  std::vector<uint16_t> halves(n, 0xDEAD), half_residual(n);
  for (size_t i = 0; i < n; ++i) {
    if (half) residual[i] = value_of_half(half_residual[i] = half_of_value(residual[i], type), type);
  }
  bool scatter = shape.groups > 1 && shape.group_outputs % 32 != 0;
  std::vector<uint32_t> bits(row_words * static_cast<size_t>(shape.n_rows()), scatter ? 0 : 0xDEADBEEFu);
  Epilogue e;
  e.values = half ? static_cast<void*>(halves.data()) : values.data();
  e.dtype = type;
  e.signs = bits.data();
  if (fused) {
    e.scale = operands.scale.data();
    e.shift = operands.shift.data();
    e.residual = half ? static_cast<const void*>(half_residual.data()) : residual.data();
    if (seed % 3 != 0) e.post_shift = operands.post_shift.data();
    if (seed % 3 == 1) e.slope = operands.slope.data(), e.sign_shift = operands.sign_shift.data();
    if (seed % 3 == 2) e.relu = true, e.low = -3, e.high = 7;
  } else {
    e.threshold = operands.threshold.data();
  }
  MatmulProblem p = problem_of(plan, shape, operands.x.data(), operands.w.data(), scratch.data(), e);
  CHECK(!launch_matmul(plan, p, terms_of(plan, shape, p.x, p.w, scratch.data()), nullptr));

  for (int row = 0; row < shape.n_rows(); ++row) {
    std::vector<uint32_t> expected_bits(row_words, 0);
    for (int o = 0; o < shape.n_outputs(); ++o) {
      size_t i = static_cast<size_t>(row) * static_cast<size_t>(shape.n_outputs()) + static_cast<size_t>(o);
      int dot = operands.dot(row, o);
      float x = finish(e, dot, o, residual[i]);
      if (is_negative(e, dot, x, o)) expected_bits[static_cast<size_t>(o / 32)] |= 1u << (o % 32);
      if (half) {
        CHECK(halves[i] == half_of_value(x, type));
      } else {
        CHECK(values[i] == x);
      }
    }
    for (size_t word = 0; word < row_words; ++word) {
      CHECK(bits[static_cast<size_t>(row) * row_words + word] == expected_bits[word]);
    }
  }
}

constexpr int kArchs[] = {800, 890, 900, 1000, 1200};  // XOR, XOR lean, AND, bytes, bytes lean

void test_linear() {
  uint64_t seed = 0;
  for (int arch : kArchs) {
    check(linear_view(9, 1, 1), 1, arch, 132, Dtype::kFloat32, false, ++seed);
    check(linear_view(17, 33, 65), 1, arch, 132, Dtype::kBFloat16, false, ++seed);
    check(linear_view(64, 512, 64), 1, arch, 1, Dtype::kFloat32, true, ++seed);
    check(linear_view(70, 1023, 70), 1, arch, 1, Dtype::kFloat16, false, ++seed);
    check(linear_view(129, 640, 132), 1, arch, 1, Dtype::kBFloat16, true, ++seed);   // large tile
    check(linear_view(20, 8192, 40), 1, arch, 132, Dtype::kFloat32, false, ++seed);  // split k
    check(linear_view(65, 5000, 33), 1, arch, 132, Dtype::kFloat32, true, ++seed);
  }
}

void test_skinny() {
  uint64_t seed = 100;
  for (int rows : {1, 3, 8})
    for (int features : {1, 31, 64, 128, 4096 + 128, 5000})
      for (int outputs : {1, 32, 45}) {
        ConvView shape = linear_view(rows, features, outputs);
        CHECK(plan_matmul(shape, {900, 132}).kernel == Kernel::kSkinny);
        check(shape, 1, 900, 132, rows == 3 ? Dtype::kFloat16 : Dtype::kFloat32, outputs == 45, ++seed);
      }
}

void test_conv() {
  uint64_t seed = 200;
  for (int arch : kArchs)
    for (int padding_value : {0, 1, -1}) {
      // kernel, stride, padding, dilation and groups; channels not a multiple of 32; vectors of 4, 2 and 1
      check(conv_view(2, {6, 3, 1, 1, 1}, {7, 3, 1, 1, 1}, 1, 128, 40), padding_value, arch, 1,
            Dtype::kFloat32, false, ++seed);
      check(conv_view(1, {9, 3, 2, 1, 1}, {8, 3, 2, 1, 1}, 1, 64, 33), padding_value, arch, 132,
            Dtype::kBFloat16, true, ++seed);
      check(conv_view(2, {7, 3, 1, 2, 2}, {5, 1, 1, 0, 1}, 1, 33, 12), padding_value, arch, 132,
            Dtype::kFloat32, true, ++seed);
      check(conv_view(1, {5, 5, 3, 4, 1}, {4, 2, 1, 3, 3}, 2, 20, 6), padding_value, arch, 132,
            Dtype::kFloat32, false, ++seed);
      check(conv_view(2, {4, 3, 1, 1, 1}, {4, 3, 1, 1, 1}, 3, 1, 1), padding_value, arch, 132,
            Dtype::kFloat16, false, ++seed);
      check(conv_view(1, {5, 3, 1, 1, 1}, {5, 3, 1, 1, 1}, 2, 96, 64), padding_value, arch, 132,
            Dtype::kFloat32, true, ++seed);
      check(conv_view(1, {7, 3, 1, 1, 1}, {7, 3, 1, 1, 1}, 1, 512, 70), padding_value, arch, 132,
            Dtype::kFloat32, false, ++seed);
    }
  // Terms: fewer taps than warps, and more of them than are counted at a time.
  for (int arch : kArchs)
    for (int padding_value : {0, -1}) {
      check(conv_view(1, {3, 2, 1, 1, 1}, {40, 1, 1, 1, 1}, 1, 256, 33), padding_value, arch, 132,
            Dtype::kFloat32, false, ++seed);
      check(conv_view(1, {5, 1, 1, 0, 1}, {9, 3, 1, 1, 1}, 1, 300, 9), padding_value, arch, 132,
            Dtype::kFloat32, true, ++seed);
      check(conv_view(1, {36, 34, 1, 1, 1}, {34, 33, 1, 1, 1}, 1, 3, 5), padding_value, arch, 132,
            Dtype::kFloat32, true, ++seed);
    }
  // A whole tall tile: 256 pixels and more x up to 64 outputs; all three vectors.
  for (int arch : kArchs)
    for (int channels : {128, 64, 20})
      check(conv_view(2, {12, 3, 1, 1, 1}, {11, 3, 1, 1, 1}, 1, channels, 50), -1, arch, 1, Dtype::kBFloat16,
            channels == 64, ++seed);
  // A whole large tile: 128 pixels and more x 128 outputs and more.
  for (int arch : kArchs)
    check(conv_view(1, {12, 3, 1, 1, 1}, {11, 3, 1, 1, 1}, 1, 128, 136), 0, arch, 1, Dtype::kFloat32, false,
          ++seed);
}

void test_plans() {
  CHECK(plan_matmul(linear_view(8192, 8192, 8192), {800, 132}).kernel == Kernel::kLargeTile);
  CHECK(plan_matmul(linear_view(8192, 8192, 8192), {800, 132}).scratch_words() == 0);
  CHECK(plan_matmul(linear_view(8192, 8192, 8192), {900, 132}).scratch_words() == 16384);
  CHECK(plan_matmul(linear_view(9, 8192, 64), {800, 132}).split.n_slices == 4);
  ConvView conv = conv_view(256, {56, 3, 1, 1, 1}, {56, 3, 1, 1, 1}, 1, 64, 64);
  CHECK(plan_matmul(conv, {800, 132}).kernel == Kernel::kTallTile);
  CHECK(plan_matmul(conv, {800, 99999}).kernel == Kernel::kSmallTile);
  CHECK(plan_matmul(conv, {800, 132}).n_classes == 9);
  CHECK(plan_matmul(conv, {800, 132}).vector_words == 2);
  conv.padding_value = 1;
  CHECK(plan_matmul(conv, {800, 132}).needs_terms == false);
}

}  // namespace

int run_all() {
  test_plans();
  test_linear();
  test_skinny();
  test_conv();
  return report("cuda products, emulated");
}

}  // namespace bop2nd::cuda

int main() { return bop2nd::cuda::run_all(); }
