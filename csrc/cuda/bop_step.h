// SPDX-License-Identifier: Apache-2.0
// The optimizer step on many tensors in one launch: both moments, the rule (core/bop_rule.h), the flips and
// their counts in one pass. One body for the GPU and for the emulated block of tests/cpp.
//
// A block does 256 words (8192 weights) of one tensor. Where rows are whole words and pointers aligned
// (flat), a thread takes 4 neighbours at a time: 16-byte accesses of fp32 state, two strips of gradient and
// moments in flight; eight lanes share a word and put its flips together by shuffles. Else a lane takes one
// weight of a word and a ballot makes the flips.
//
// Cost: 20.25 bytes per weight with fp32 state and gradients and packed weights; bound by memory.
// Limits: 48 tensors a launch (kernel parameters stay below 4 KiB), 2^31 - 1
// words a tensor; no fused multiply-add anywhere.
#pragma once

#include "../core/bop_rule.h"
#include "../core/rounding.h"
#include "thread_lane.h"
#include "value.h"

namespace bop2nd::cuda {

struct StepTensor {
  void* weight;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  int64_t n_words;  // of all rows; dense weights: blocks of 32
  int64_t length;   // elements of a row; dense weights are one row
  int32_t index;    // in the operator's list: key of the rounding, row of `counts`
  int32_t first_block;
  Dtype weight_type, grad_type;
  bool flat;
};

struct StepBatch {
  static constexpr int kMaxTensors = 48, kThreads = 256, kBlockWords = 256, kStrips = 2;

  const float* hyper = nullptr;      // gamma, sigma, a, b
  const float* inv_scale = nullptr;  // or null
  const float* found_inf = nullptr;  // or null
  const int64_t* seed = nullptr;     // (seed, step); with bf16 state
  int64_t* counts = nullptr;         // [n, 2], zeroed
  bool maximize = false;
  Dtype state_type = Dtype::kFloat32;
  bool second_moment = true;
  int32_t n_tensors = 0;
  StepTensor tensors[kMaxTensors];

  BOP2ND_HD int tensor_of(int block) const {  // the last one that starts at or before the block
    int low = 0, high = n_tensors - 1;
    while (low < high) {
      int middle = (low + high + 1) / 2;
      if (tensors[middle].first_block <= block) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};
static_assert(sizeof(StepBatch) <= 4096, "kernel parameters");

// Whether four neighbours may be loaded at once and words are whole.
inline bool step_is_flat(const StepTensor& t, Dtype state) {
  auto aligned = [](const void* at, int n_bytes) {
    return reinterpret_cast<uintptr_t>(at) % static_cast<uintptr_t>(n_bytes) == 0;
  };
  bool packed = t.weight_type == Dtype::kPacked;
  int state_bytes = 4 * bytes_of(state);
  return t.length % (packed ? kWordBits : 4) == 0 && aligned(t.grad, 4 * bytes_of(t.grad_type)) &&
         aligned(t.exp_avg, state_bytes) && aligned(t.exp_avg_sq, state_bytes) &&
         (packed || aligned(t.weight, 4 * bytes_of(t.weight_type)));
}

struct StepThread {
  int32_t candidates, flips;
  uint32_t word[StepBatch::kStrips], flip_bits[StepBatch::kStrips];
};

template <Dtype kState, bool kSecond, class Block>
struct StepBlock {
  using Threads = typename Block::template Threads<StepThread, StepBatch::kThreads>;

  Block& block;
  const StepBatch& batch;
  Threads threads;
  StepTensor tensor;
  Hyper<ThreadLane> hyper;
  float grad_scale;
  uint32_t key;

  BOP2ND_HD StepBlock(Block& block_, const StepBatch& batch_, int tensor_index)
      : block(block_), batch(batch_), tensor(batch_.tensors[tensor_index]) {
    hyper.gamma = batch.hyper[0], hyper.sigma = batch.hyper[1], hyper.a = batch.hyper[2];
    hyper.b = batch.hyper[3], hyper.screen = 0.0f;
    grad_scale = batch.inv_scale ? *batch.inv_scale : 1.0f;
    if (batch.maximize) grad_scale = -grad_scale;  // g * (-s) and -(g * s) are the same number
    key = kState == Dtype::kBFloat16 ? rounding_key(batch.seed[0], batch.seed[1], tensor.index) : 0;
  }

  struct Moments {
    float m, v;
    uint16_t m_bits, v_bits;  // rounded, with bf16 state
  };

  BOP2ND_HD Verdict<ThreadLane> update(float g, Moments& s, bool negative, int64_t element) {
    Verdict<ThreadLane> verdict =
        bop_rule<ThreadLane, kSecond>(hyper, ThreadLane::mul(g, grad_scale), s.m, s.v, negative);
    if (kState == Dtype::kBFloat16) {
      uint32_t high = rounding_key_at(key, static_cast<uint32_t>(static_cast<uint64_t>(element) >> 32));
      uint32_t random = rounding_bits<ThreadLane>(static_cast<uint32_t>(element), high);
      s.m_bits = static_cast<uint16_t>(round_bf16_stochastic<ThreadLane>(s.m, random & 0xFFFFu));
      if (kSecond) s.v_bits = static_cast<uint16_t>(round_bf16_stochastic<ThreadLane>(s.v, random >> 16));
    }
    return verdict;
  }

  // The rounded value is what bf16 state stores; fp32 state stores the value itself.
  BOP2ND_HD static void store_quad(void* base, int64_t element, const Float4& x, const Half4& rounded) {
    if (kState == Dtype::kBFloat16) {
      static_cast<Half4*>(base)[element / 4] = rounded;
    } else {
      static_cast<Float4*>(base)[element / 4] = x;
    }
  }
  BOP2ND_HD static void store_one(void* base, int64_t element, float x, uint16_t rounded) {
    if (kState == Dtype::kBFloat16) {
      static_cast<uint16_t*>(base)[element] = rounded;
    } else {
      static_cast<float*>(base)[element] = x;
    }
  }

  // Four neighbours from `element` on, already loaded; returns nothing but leaves flips in the thread.
  BOP2ND_HD void update_quad(StepThread& t, int strip, int64_t element, int lane, const Float4& g, Float4 m,
                             Float4 v, const Float4& w) {
    bool packed = tensor.weight_type == Dtype::kPacked;
    int shift = lane % 8 * 4;
    Half4 m_bits{}, v_bits{};
    uint32_t flips = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bool negative = packed ? (t.word[strip] >> (shift + i)) & 1u : w.v[i] < 0.0f;
      Moments s{};
      s.m = m.v[i], s.v = v.v[i];
      Verdict<ThreadLane> verdict = update(g.v[i], s, negative, element + i);
      m.v[i] = s.m;
      v.v[i] = s.v;
      m_bits.v[i] = s.m_bits;
      v_bits.v[i] = s.v_bits;
      t.candidates += verdict.candidates ? 1 : 0;
      t.flips += verdict.flips ? 1 : 0;
      flips |= (verdict.flips ? 1u : 0u) << i;
    }
    store_quad(tensor.exp_avg, element, m, m_bits);
    if (kSecond) store_quad(tensor.exp_avg_sq, element, v, v_bits);
    t.flip_bits[strip] = flips << shift;
    if (!packed && flips) {
      Float4 turned = w;
#pragma unroll
      for (int i = 0; i < 4; ++i) turned.v[i] = (flips >> i) & 1u ? -w.v[i] : w.v[i];
      store_value4(tensor.weight, tensor.weight_type, element, turned);
    }
  }

  BOP2ND_HD void flat(int64_t first_word, int n_words) {
    constexpr int kStripElements = StepBatch::kThreads * 4, kStrips = StepBatch::kStrips;
    bool packed = tensor.weight_type == Dtype::kPacked;
    int64_t first = first_word * 32, end = first + static_cast<int64_t>(n_words) * 32;
    if (!packed && end > tensor.length) end = tensor.length;
    uint32_t* words = static_cast<uint32_t*>(tensor.weight);
#pragma unroll 1
    for (int64_t start = first; start < end; start += kStrips * kStripElements) {
      block.each(threads, [&](int thread, StepThread& t) {
        Float4 g[kStrips], m[kStrips], v[kStrips], w[kStrips];
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          int64_t element = start + s * kStripElements + thread * 4;
          t.flip_bits[s] = t.word[s] = 0;
          if (element >= end) continue;
          m[s] = load_value4(tensor.exp_avg, kState, element);
          v[s] = kSecond ? load_value4(tensor.exp_avg_sq, kState, element) : Float4{};
          g[s] = load_value4(tensor.grad, tensor.grad_type, element);
          if (packed) {
            t.word[s] = words[element / 32];
            w[s] = Float4{};
          } else {
            w[s] = load_value4(tensor.weight, tensor.weight_type, element);
          }
        }
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          int64_t element = start + s * kStripElements + thread * 4;
          if (element < end) update_quad(t, s, element, thread % 32, g[s], m[s], v[s], w[s]);
        }
      });
      if (!packed) continue;
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        block.template or_lanes<8>(threads, [s](StepThread& t) -> uint32_t& { return t.flip_bits[s]; });
      }
      block.each(threads, [&](int thread, StepThread& t) {
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          int64_t element = start + s * kStripElements + thread * 4;
          if (thread % 8 == 0 && element < end && t.flip_bits[s])
            words[element / 32] = t.word[s] ^ t.flip_bits[s];
        }
      });
    }
  }

  // Rows that end inside a word, or pointers that are not aligned: a lane to a weight.
  BOP2ND_HD void ragged(int64_t first_word, int n_words) {
    constexpr int kWarps = StepBatch::kThreads / 32;
    bool packed = tensor.weight_type == Dtype::kPacked;
    BitLayout layout{tensor.length};
    uint32_t* words = static_cast<uint32_t*>(tensor.weight);
#pragma unroll 1
    for (int round = 0; round * kWarps < n_words; ++round) {
      block.ballot(
          threads,
          [&](int thread, StepThread& t) {
            int of_block = round * kWarps + thread / 32, lane = thread % 32;
            if (of_block >= n_words) return false;
            int64_t at = first_word + of_block;
            uint32_t row_words = static_cast<uint32_t>(layout.row_words());
            int64_t row = static_cast<uint32_t>(at) / row_words, word = static_cast<uint32_t>(at) % row_words;
            if (lane >= layout.elements_in(word)) return false;
            int64_t element = row * tensor.length + word * 32 + lane;
            float w = packed ? 0.0f : load_value(tensor.weight, tensor.weight_type, element);
            bool negative = packed ? (words[at] >> lane) & 1u : w < 0.0f;
            Moments s{};
            s.m = load_value(tensor.exp_avg, kState, element);
            if (kSecond) s.v = load_value(tensor.exp_avg_sq, kState, element);
            float g = load_value(tensor.grad, tensor.grad_type, element);
            Verdict<ThreadLane> verdict = update(g, s, negative, element);
            store_one(tensor.exp_avg, element, s.m, s.m_bits);
            if (kSecond) store_one(tensor.exp_avg_sq, element, s.v, s.v_bits);
            if (!packed && verdict.flips) store_value(tensor.weight, tensor.weight_type, element, -w);
            t.candidates += verdict.candidates ? 1 : 0;
            t.flips += verdict.flips ? 1 : 0;
            return packed && verdict.flips;
          },
          [&](int thread, StepThread&, uint32_t flips) {
            int of_block = round * kWarps + thread / 32;
            if (thread % 32 == 0 && of_block < n_words && flips) words[first_word + of_block] ^= flips;
          });
    }
  }

  BOP2ND_HD void run(int block_of_tensor) {
    int32_t* totals = block.template shared<int32_t>(0);
    block.each(threads, [&](int thread, StepThread& t) {
      t.candidates = t.flips = 0;
      if (thread < 2) totals[thread] = 0;
    });
    block.sync();
    int64_t first_word = static_cast<int64_t>(block_of_tensor) * StepBatch::kBlockWords;
    int64_t left = tensor.n_words - first_word;
    int n_words = left < StepBatch::kBlockWords ? static_cast<int>(left) : StepBatch::kBlockWords;
    if (tensor.flat) {
      flat(first_word, n_words);
    } else {
      ragged(first_word, n_words);
    }
    block.template sum_lanes<32>(threads, [](StepThread& t) -> int32_t& { return t.candidates; });
    block.template sum_lanes<32>(threads, [](StepThread& t) -> int32_t& { return t.flips; });
    block.each(threads, [&](int thread, StepThread& t) {
      if (thread % 32 != 0) return;
      block.atomic_add(totals, t.candidates);
      block.atomic_add(totals + 1, t.flips);
    });
    block.sync();
    block.each(threads, [&](int thread, StepThread&) {
      if (thread < 2)
        block.atomic_add(batch.counts + 2 * tensor.index + thread, static_cast<int64_t>(totals[thread]));
    });
  }
};

template <Dtype kState, bool kSecond, class Block>
BOP2ND_HD void step_block(Block& block, const StepBatch& batch, int index) {
  if (batch.found_inf && *batch.found_inf != 0.0f) return;
  int tensor = batch.tensor_of(index);
  StepBlock<kState, kSecond, Block>(block, batch, tensor).run(index - batch.tensors[tensor].first_block);
}

}  // namespace bop2nd::cuda
