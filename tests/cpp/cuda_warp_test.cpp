// SPDX-License-Identifier: Apache-2.0
// Kernel bodies with warps that run at once (cuda_warp_block.h), to be built with -fsanitize=thread and run
// by tests/test_cuda_barriers.py:  cuda_warp_test <kernel> [barrier to leave out] Prints how many barriers a
// block met; exits with 1 if a value is wrong, and as ThreadSanitizer says at a race.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>

#include "../../csrc/cuda/binary_plan.h"
#include "../../csrc/cuda/bop_step.h"
#include "cuda_random.h"
#include "cuda_shapes.h"
#include "cuda_warp_block.h"

namespace bop2nd::cuda {
namespace {

// A linear layer by one tile of its kernel, its slices of k at once; values and bits against plain popcounts.
template <class Tile, Math math>
int run_tile(int rows, int n_stages, int outputs, int n_slices, int skipped) {
  int k_words = n_stages * Tile::kStageWords;
  ConvView shape = linear_view(rows, k_words * 32, outputs);
  MatmulPlan plan;
  plan.math = math;
  plan.vector_words = 4;
  plan.n_tiles = 1;
  plan.split = {n_stages, n_slices};
  plan.needs_terms = math != Math::kXorBits;
  if (plan.needs_terms) plan.column_term_words = outputs, plan.pixel_count_words = rows;
  if (n_slices > 1) plan.partial_words = Tile::kRows * Tile::kCols, plan.arrival_words = 1;

  Random random(7);
  std::vector<uint32_t> x = random.words(static_cast<size_t>(rows * k_words)),
                        w = random.words(static_cast<size_t>(outputs * k_words));
  std::vector<int32_t> scratch(static_cast<size_t>(plan.scratch_words()) + 1, 0);
  size_t row_words = static_cast<size_t>(words_for(outputs));
  std::vector<float> values(static_cast<size_t>(rows * outputs), -1e9f);
  std::vector<uint32_t> bits(static_cast<size_t>(rows) * row_words, 0xDEADBEEFu);
  Epilogue e;
  e.values = values.data();
  e.dtype = Dtype::kFloat32;
  e.signs = bits.data();
  MatmulProblem p = problem_of(plan, shape, x.data(), w.data(), scratch.data(), e);
  TermsProblem terms = terms_of(plan, shape, x.data(), w.data(), scratch.data());
  for (int64_t i = 0; plan.needs_terms && i < terms.n_blocks(); ++i)
    run_warps(TermsProblem::kThreads, TermsProblem::kSharedBytes, -1,
              [&](WarpBlock& block) { terms_block(block, terms, i); });
  std::vector<std::thread> slices;
  std::vector<int> n_syncs(static_cast<size_t>(n_slices));
  for (int slice = 0; slice < n_slices; ++slice)
    slices.emplace_back([&, slice] {
      n_syncs[static_cast<size_t>(slice)] = run_warps(
          Tile::kThreads, Tile::kSharedBytes, skipped,
          [&](WarpBlock& block) { MatmulBlock<Tile, math, 4, WarpBlock>(block, p, 0, slice).run(); });
    });
  for (std::thread& slice : slices) slice.join();

  for (int row = 0; row < rows; ++row)
    for (int col = 0; col < outputs; ++col) {
      int differing = 0;
      for (int k = 0; k < k_words; ++k)
        differing += __builtin_popcount(x[static_cast<size_t>(row * k_words + k)] ^
                                        w[static_cast<size_t>(col * k_words + k)]);
      int dot = k_words * 32 - 2 * differing;
      uint32_t word = bits[static_cast<size_t>(row) * row_words + static_cast<size_t>(col / 32)];
      CHECK(values[static_cast<size_t>(row * outputs + col)] == static_cast<float>(dot));
      CHECK(((word >> (col % 32)) & 1) == (dot < 0 ? 1u : 0u));
    }
  int most = 0;
  for (int n : n_syncs) most = n > most ? n : most;  // the last slice to arrive goes on
  return most;
}

// More taps than are counted at a time, so that counts are overwritten.
int run_terms(int skipped) {
  ConvView shape = conv_view(1, {40, 40, 1, 1, 1}, {40, 40, 1, 1, 1}, 1, 32, 2, -1);
  Random random(9);
  std::vector<uint32_t> w = random.words(static_cast<size_t>(shape.n_outputs() * shape.k_words()));
  std::vector<int32_t> terms(static_cast<size_t>(shape.n_classes() * shape.n_outputs()), -1);
  TermsProblem p;
  p.w = w.data();
  p.shape = shape;
  p.n_classes = shape.n_classes();
  p.subtract_popcounts = true;
  p.column_terms = terms.data();
  int n_syncs = 0;
  for (int output = 0; output < shape.n_outputs(); ++output)
    n_syncs = run_warps(TermsProblem::kThreads, TermsProblem::kSharedBytes, skipped,
                        [&](WarpBlock& block) { terms_block(block, p, output); });
  for (int c = 0; c < shape.n_classes(); ++c)
    for (int output = 0; output < shape.n_outputs(); ++output) {
      int expected = shape.k_elements();
      for (int tap = 0; tap < shape.n_taps(); ++tap) {
        int negative = __builtin_popcount(w[static_cast<size_t>(output * shape.k_words() + tap)]);
        expected -= 2 * negative;
        if (shape.input_pixel(shape.pixel_of_class(c), tap / 40, tap % 40) < 0) {
          expected += 2 * (2 * negative - 32);
        }
      }
      CHECK(terms[static_cast<size_t>(c * shape.n_outputs() + output)] == expected);
    }
  return n_syncs;
}

int run_skinny(int skipped) {
  constexpr int kRows = 5, kWords = 32, kOutputs = 20;
  Random random(11);
  std::vector<uint32_t> x = random.words(kRows * kWords), w = random.words(kOutputs * kWords);
  std::vector<float> values(kRows * kOutputs, -1e9f);
  MatmulProblem p;
  p.x = x.data();
  p.w = w.data();
  p.shape = linear_view(kRows, kWords * 32, kOutputs);
  p.epilogue.values = values.data();
  p.epilogue.dtype = Dtype::kFloat32;
  int n_syncs = run_warps(SkinnyTile::kThreads, SkinnyTile::kSharedBytes, skipped,
                          [&](WarpBlock& block) { skinny_block<4>(block, p, 0); });
  for (int row = 0; row < kRows; ++row)
    for (int col = 0; col < kOutputs; ++col) {
      int differing = 0;
      for (int k = 0; k < kWords; ++k)
        differing += __builtin_popcount(x[static_cast<size_t>(row * kWords + k)] ^
                                        w[static_cast<size_t>(col * kWords + k)]);
      CHECK(values[static_cast<size_t>(row * kOutputs + col)] ==
            static_cast<float>(kWords * 32 - 2 * differing));
    }
  return n_syncs;
}

// One tensor of rows of `length`; how many flip is told by the words, and must be what was counted.
int run_step(int length, int n_rows, int skipped) {
  size_t n = static_cast<size_t>(length * n_rows),
         n_words = static_cast<size_t>(words_for(length)) * static_cast<size_t>(n_rows);
  Random random(13);
  std::vector<float> grad(n), m(n, 0.01f), v(n, 1e-8f);
  for (float& g : grad) g = random.uniform();
  std::vector<uint32_t> words(n_words, 0u), before = words;
  float hyper[4] = {0.5f, 0.5f, 1e-6f, 1e-6f};
  std::vector<int64_t> counts(2, 0);
  StepBatch batch;
  batch.hyper = hyper;
  batch.counts = counts.data();
  batch.n_tensors = 1;
  StepTensor& t = batch.tensors[0] = {};
  t.weight = words.data();
  t.grad = grad.data();
  t.exp_avg = m.data();
  t.exp_avg_sq = v.data();
  t.length = length;
  t.n_words = static_cast<int64_t>(n_words);
  t.weight_type = Dtype::kPacked;
  t.grad_type = Dtype::kFloat32;
  t.flat = step_is_flat(t, Dtype::kFloat32);
  int n_syncs = 0, flips = 0;
  for (size_t first = 0; first < n_words; first += StepBatch::kBlockWords)
    n_syncs = run_warps(StepBatch::kThreads, 16, skipped, [&](WarpBlock& block) {
      step_block<Dtype::kFloat32, true>(block, batch, static_cast<int>(first / StepBatch::kBlockWords));
    });
  for (size_t i = 0; i < n_words; ++i) flips += __builtin_popcount(words[i] ^ before[i]);
  CHECK(flips > 0 && counts[1] == flips && counts[0] >= flips && t.flat == (length % 32 == 0));
  return n_syncs;
}

}  // namespace

int run(const std::string& kernel, int skipped) {
  const std::map<std::string, std::function<int(int)>> kernels = {
      {"small", [](int skip) { return run_tile<SmallTile, Math::kXorBits>(60, 6, 50, 1, skip); }},
      {"lean", [](int skip) { return run_tile<LargeTile::Lean, Math::kXorBits>(100, 4, 100, 1, skip); }},
      {"split", [](int skip) { return run_tile<SmallTile, Math::kAndBits>(20, 6, 40, 3, skip); }},
      {"lean split", [](int skip) { return run_tile<LargeTile::Lean, Math::kAndBits>(80, 4, 70, 2, skip); }},
      {"terms", run_terms},
      {"skinny", run_skinny},
      {"step, whole words", [](int skip) { return run_step(8192, 1, skip); }},
      {"step, ragged rows", [](int skip) { return run_step(100, 70, skip); }},
  };
  auto found = kernels.find(kernel);
  if (found == kernels.end()) {
    for (const auto& [name, _] : kernels) std::printf("%s\n", name.c_str());
    return 2;
  }
  std::printf("%d\n", found->second(skipped));
  return n_failures == 0 && n_checks > 0 ? 0 : 1;
}

}  // namespace bop2nd::cuda

int main(int n_arguments, char** arguments) {
  return bop2nd::cuda::run(n_arguments > 1 ? arguments[1] : "",
                           n_arguments > 2 ? std::atoi(arguments[2]) : -1);
}
