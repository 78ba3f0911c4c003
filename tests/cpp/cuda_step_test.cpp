// SPDX-License-Identifier: Apache-2.0
// The bodies of the CUDA step, pack and unpack kernels, executed by emulated blocks and compared with loops
// written from reference.py: packed and dense weights, all dtypes, flat and ragged rows, several tensors.
#include <cmath>
#include <cstring>
#include <limits>

#include "../../csrc/cuda/launch.h"
#include "cuda_random.h"

namespace bop2nd::cuda {
namespace {

const float kNaN = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();

// Memory of any element type, 16-byte aligned, with poison behind its end.
struct Buffer {
  Dtype type;
  std::vector<Word4> memory;
  Buffer(Dtype t, size_t n) : type(t), memory(n / 4 + 2) {
    std::memset(memory.data(), 0x7B, memory.size() * 16);
  }
  float get(int64_t i) const { return load_value(memory.data(), type, i); }
  void set(int64_t i, float x) { store_value(memory.data(), type, i, x); }
  uint32_t* words() { return memory[0].v; }
  void one_kind_of_nan(int64_t n) {  // its sign is nobody's business
    for (int64_t i = 0; i < n; ++i) {
      if (std::isnan(get(i))) set(i, kNaN);
    }
  }
  bool same(const Buffer& other) const {
    return std::memcmp(memory.data(), other.memory.data(), memory.size() * 16) == 0;
  }
};

uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

float rounded_state(Dtype type, float x, uint32_t random16) {
  if (type == Dtype::kFloat32) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7F800000u) != 0x7F800000u) {
    bits += random16;
  } else if (bits & 0x007FFFFFu) {
    bits |= 0x00400000u;
  }
  bits &= 0xFFFF0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct Parameter {
  Dtype weight_type, grad_type, state_type;
  int64_t rows, length, row_words;
  Buffer weight, grad, m, v;

  Parameter(Dtype w, Dtype g, Dtype s, int64_t rows_, int64_t length_, Random* random)
      : weight_type(w),
        grad_type(g),
        state_type(s),
        rows(rows_),
        length(length_),
        row_words(words_for(length_)),
        weight(w == Dtype::kPacked ? Dtype::kFloat32 : w,
               static_cast<size_t>(w == Dtype::kPacked ? rows * row_words : rows * length)),
        grad(g, static_cast<size_t>(rows * length)),
        m(s, static_cast<size_t>(rows * length)),
        v(s, static_cast<size_t>(rows * length)) {
    for (int64_t i = 0; i < rows * length; ++i) {
      grad.set(i, random->uniform());
      m.set(i, random->uniform() * 0.1f);
      v.set(i, std::fabs(random->uniform()));
      if (w != Dtype::kPacked) weight.set(i, random->next() & 1 ? -1.0f : 1.0f);
    }
    if (w == Dtype::kPacked) {
      for (int64_t i = 0; i < rows * row_words; ++i) {
        weight.words()[i] = random->next() & low_bits(BitLayout{length}.elements_in(i % row_words));
      }
    }
    if (rows * length > 40) {
      float special[] = {kNaN, kInf, -kInf, 0.0f, -0.0f, 1e-40f};
      for (int i = 0; i < 6; ++i) grad.set(3 * i, special[i]);
    }
  }

  // The specification, one weight at a time.
  void step(const float* hyper, float inv_scale, bool maximize, bool second, const int64_t* seed, int index,
            int64_t* counts) {
    uint32_t key = mix(static_cast<uint32_t>(seed[0]));
    key = mix(key ^ static_cast<uint32_t>(static_cast<uint64_t>(seed[0]) >> 32));
    key = mix(key ^ static_cast<uint32_t>(seed[1]));
    key = mix(key ^ static_cast<uint32_t>(index));
    counts[0] = counts[1] = 0;
    for (int64_t i = 0; i < rows * length; ++i) {
      volatile float g = grad.get(i) * inv_scale;
      if (maximize) g = -g;
      volatile float old = m.get(i), difference = g - old, part = hyper[0] * difference, mean = old + part;
      volatile float bound = hyper[3], square = v.get(i);
      if (second) {
        volatile float gg = g * g, d = gg - square, p = hyper[1] * d;
        square = square + p;
        volatile float root = static_cast<float>(std::sqrt(static_cast<double>(square))),
                       scaled = hyper[2] * root;
        bound = scaled + hyper[3];
      }
      int64_t word = i / length * row_words + i % length / 32, bit = i % length % 32;
      bool packed = weight_type == Dtype::kPacked;
      bool negative = packed ? (weight.words()[word] >> bit) & 1 : weight.get(i) < 0;
      bool candidate = (mean < 0) == negative, flip = candidate && std::fabs(mean) > bound;
      counts[0] += candidate;
      counts[1] += flip;
      uint32_t random = mix(static_cast<uint32_t>(i) ^ key);
      m.set(i, rounded_state(state_type, mean, random & 0xFFFF));
      if (second) v.set(i, rounded_state(state_type, square, random >> 16));
      if (flip && packed) weight.words()[word] ^= 1u << bit;
      if (flip && !packed) weight.set(i, -weight.get(i));
    }
  }

  StepTensor describe(int index, int* first_block) {
    StepTensor t{};
    t.weight = weight.memory.data();
    t.grad = grad.memory.data();
    t.exp_avg = m.memory.data();
    t.exp_avg_sq = v.memory.data();
    bool packed = weight_type == Dtype::kPacked;
    t.n_words = packed ? rows * row_words : words_for(rows * length);
    t.length = packed ? length : rows * length;
    t.index = index;
    t.first_block = *first_block;
    t.weight_type = weight_type;
    t.grad_type = grad_type;
    t.flat = step_is_flat(t, state_type);
    *first_block += static_cast<int>((t.n_words + StepBatch::kBlockWords - 1) / StepBatch::kBlockWords);
    return t;
  }
};

void check_step(Dtype state, bool second, bool maximize, float inv_scale, bool found_inf,
                uint64_t seed_value) {
  Random random(seed_value);
  const Dtype packed = Dtype::kPacked, f32 = Dtype::kFloat32, bf16 = Dtype::kBFloat16, f16 = Dtype::kFloat16;
  std::vector<Parameter> ours = {
      Parameter(packed, f32, state, 3, 64, &random),        Parameter(packed, bf16, state, 5, 33, &random),
      Parameter(packed, f16, state, 300, 32, &random),      Parameter(f32, f32, state, 1, 1000, &random),
      Parameter(bf16, bf16, state, 1, 77, &random),         Parameter(packed, f32, state, 1, 1, &random),
      Parameter(f16, f16, state, 1, 8200, &random),         Parameter(packed, f32, state, 260, 47, &random),
      Parameter(packed, bf16, state, 1, 8192 + 32, &random)};
  std::vector<Parameter> theirs = ours;
  float hyper[4] = {0.25f, 0.125f, 0.07f, 0.01f};
  int64_t seed[2] = {0x1234567890LL + static_cast<int64_t>(seed_value), 17};
  float flag = found_inf ? 1.0f : 0.0f;
  std::vector<int64_t> counts(2 * ours.size(), 0), expected(2 * ours.size(), 0);
  StepBatch batch;
  batch.hyper = hyper;
  batch.inv_scale = &inv_scale;
  batch.found_inf = &flag;
  batch.seed = seed;
  batch.counts = counts.data();
  batch.maximize = maximize;
  batch.state_type = state;
  batch.second_moment = second;
  int n_blocks = 0;
  for (size_t i = 0; i < ours.size(); ++i) {
    batch.tensors[batch.n_tensors++] = ours[i].describe(static_cast<int>(i), &n_blocks);
    if (!found_inf)
      theirs[i].step(hyper, inv_scale, maximize, second, seed, static_cast<int>(i), &expected[2 * i]);
  }
  CHECK(batch.tensors[0].flat && !batch.tensors[1].flat && batch.tensors[2].flat && batch.tensors[3].flat);
  CHECK(!batch.tensors[4].flat && batch.tensors[6].flat && batch.tensors[8].flat);
  CHECK(!launch_step(batch, n_blocks, nullptr));
  int64_t flips = 0;
  for (size_t i = 0; i < ours.size(); ++i) {
    for (Parameter* parameter : {&ours[i], &theirs[i]}) {
      parameter->m.one_kind_of_nan(parameter->rows * parameter->length);
      parameter->v.one_kind_of_nan(parameter->rows * parameter->length);
    }
    CHECK(ours[i].weight.same(theirs[i].weight));
    CHECK(ours[i].m.same(theirs[i].m));
    CHECK(ours[i].v.same(theirs[i].v));
    CHECK(counts[2 * i] == expected[2 * i]);
    CHECK(counts[2 * i + 1] == expected[2 * i + 1]);
    flips += counts[2 * i + 1];
  }
  CHECK(found_inf ? flips == 0 : flips > 1000);
}

void test_step() {
  uint64_t seed = 40;
  for (Dtype state : {Dtype::kFloat32, Dtype::kBFloat16})
    for (bool second : {true, false}) {
      check_step(state, second, false, 1.0f, false, ++seed);
      check_step(state, second, true, 0.3f, false, ++seed);
      check_step(state, second, false, 0.5f, true, ++seed);
    }
}

// [outer, inner, groups, length], stored either in that order or as NCHW: [outer, groups, length, inner].
template <Dtype kType>
void check_pack(int outer, int inner, int groups, int length, bool channels_first, PackProblem::Path path) {
  Random random(static_cast<uint64_t>(outer * 1000 + inner * 100 + length));
  int64_t n = static_cast<int64_t>(outer) * inner * groups * length, row_words = words_for(length);
  Buffer x(kType, static_cast<size_t>(n));
  float special[] = {0.0f, -0.0f, kNaN, 1.0f, -1.0f, kInf, -kInf, 1.0078125f, -1e-40f};
  for (int64_t i = 0; i < n; ++i)
    x.set(i, random.below(4) == 0 ? special[random.below(9)] : random.uniform() * 2);
  PackProblem p = PackProblem::of(outer, inner, groups, length);
  p.outer_stride = static_cast<int64_t>(inner) * groups * length;
  p.inner_stride = channels_first ? 1 : groups * length;
  p.group_stride = static_cast<int64_t>(channels_first ? inner : 1) * length;
  p.length_stride = channels_first ? inner : 1;
  size_t n_words = static_cast<size_t>(p.n_words);
  std::vector<uint32_t> signs(n_words, 0xABABABABu), mask = signs, signs_only = signs;
  p.x = x.memory.data();
  p.type = kType;
  p.signs = signs.data();
  p.mask = mask.data();
  p.choose_path();
  CHECK(p.path == path);
  CHECK(!launch_pack(p, nullptr));
  p.signs = signs_only.data();
  p.mask = nullptr;
  CHECK(!launch_pack(p, nullptr));
  size_t at = 0;
  for (int o = 0; o < outer; ++o)
    for (int i = 0; i < inner; ++i)
      for (int g = 0; g < groups; ++g)
        for (int64_t w = 0; w < row_words; ++w, ++at) {
          uint32_t expected_signs = 0, expected_mask = 0;
          for (int e = 0; e < 32 && w * 32 + e < length; ++e) {
            float value = x.get(o * p.outer_stride + i * p.inner_stride + g * p.group_stride +
                                (w * 32 + e) * p.length_stride);
            expected_signs |= (value < 0 ? 1u : 0u) << e;
            expected_mask |= (std::fabs(value) <= 1 ? 1u : 0u) << e;
          }
          CHECK(signs[at] == expected_signs);
          CHECK(mask[at] == expected_mask);
          CHECK(signs_only[at] == expected_signs);
        }
}

template <Dtype kType>
void check_unpack(int64_t rows, int64_t length) {
  Random random(static_cast<uint64_t>(rows * 97 + length));
  std::vector<uint32_t> words = random.words(static_cast<size_t>(rows * words_for(length)));
  Buffer out(kType, static_cast<size_t>(rows * length)), expected = out;
  UnpackProblem p;
  p.words = words.data();
  p.elements = out.memory.data();
  p.type = kType;
  p.n_rows = rows;
  p.length = length;
  CHECK(!launch_unpack(p, nullptr));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t e = 0; e < length; ++e) {
      expected.set(
          r * length + e,
          (words[static_cast<size_t>(r * words_for(length) + e / 32)] >> (e % 32)) & 1 ? -1.0f : 1.0f);
    }
  CHECK(out.same(expected));
}

template <Dtype kType>
void test_pack() {
  using Path = PackProblem::Path;
  check_pack<kType>(1, 1, 1, 1, false, Path::kRows);
  check_pack<kType>(3, 5, 1, 64, false, Path::kFlat);
  check_pack<kType>(2, 3, 2, 96, false, Path::kFlat);
  check_pack<kType>(40, 1, 1, 512, false, Path::kFlat);
  check_pack<kType>(3, 5, 1, 33, false, Path::kRows);
  check_pack<kType>(2, 4, 3, 20, false, Path::kRows);
  check_pack<kType>(2, 49, 1, 64, true, Path::kColumns);
  check_pack<kType>(2, 30, 2, 35, true, Path::kColumns);
  for (int64_t length : {1, 4, 31, 32, 36, 100, 512}) check_unpack<kType>(13, length);
}

}  // namespace

int run_all() {
  test_step();
  test_pack<Dtype::kFloat32>();
  test_pack<Dtype::kBFloat16>();
  test_pack<Dtype::kFloat16>();
  return report("cuda step and packing, emulated");
}

}  // namespace bop2nd::cuda

int main() { return bop2nd::cuda::run_all(); }
