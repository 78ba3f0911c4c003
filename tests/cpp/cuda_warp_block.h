// SPDX-License-Identifier: Apache-2.0
// An emulated block whose warps are threads of the operating system: the vocabulary of
// csrc/cuda/device_block.cuh once more (see cuda_host_block.h), for ThreadSanitizer. `sync` is a barrier, all
// else that warps share is plain memory, so that whoever reads what another warp wrote without a barrier
// between is reported. Atomics are relaxed, as the GPU's are: they order nothing. Asynchronous copies spoil
// their target when issued and land when waited for, both as writes of the warp that issued them. Limits: not
// the GPU's memory model (fences do nothing), no divergence inside a warp.
#pragma once

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "../../csrc/cuda/tile.h"

namespace bop2nd::cuda {

// The barriers of a block, each met once and with a counter of its own: one that is used again (a
// pthread_barrier_t) would show a slow warp what a fast one has published at the next, and hide races.
struct Barriers {
  static constexpr int kMost = 256;

  int n_warps;
  std::array<std::atomic<int>, kMost> arrived{};

  void wait(int index) {
    if (index >= kMost) std::abort();
    std::atomic<int>& here = arrived[static_cast<size_t>(index)];
    here.fetch_add(1, std::memory_order_acq_rel);
    while (here.load(std::memory_order_acquire) < n_warps) std::this_thread::yield();
  }
};

class WarpBlock {
 public:
  template <class T, int n>
  struct Threads {
    T of[32];
  };

  // `skipped`: which barrier is left out (by all warps), or -1.
  WarpBlock(unsigned char* shared, Barriers* barriers, int warp, int skipped)
      : shared_(shared), barriers_(barriers), warp_(warp), skipped_(skipped) {}
  int n_syncs() const { return n_syncs_; }

  template <class T>
  T* shared(int byte_offset) {
    return reinterpret_cast<T*>(shared_ + byte_offset);
  }
  template <class T, int n, class F>
  void each(Threads<T, n>& threads, F f) {
    for (int lane = 0; lane < 32; ++lane) f(warp_ * 32 + lane, threads.of[lane]);
  }
  template <class T, class U, int n, class F>
  void each(Threads<T, n>& first, Threads<U, n>& second, F f) {
    for (int lane = 0; lane < 32; ++lane) f(warp_ * 32 + lane, first.of[lane], second.of[lane]);
  }
  void sync() {
    int index = n_syncs_++;
    if (index != skipped_) barriers_->wait(index);
  }
  void fence() {}

  template <int n_bytes>
  void copy_async(int target, const uint32_t* base, int32_t offset, bool exists) {
    Copy copy{target, n_bytes, {}};
    if (exists) std::memcpy(copy.data, base + offset, n_bytes);
    std::memset(shared_ + target, 0x5A, n_bytes);
    open_.push_back(copy);
  }
  void commit_copies() {
    groups_.push_back(open_);
    open_.clear();
  }
  template <int n_pending>
  void wait_copies() {
    while (groups_.size() > n_pending) {
      for (const Copy& copy : groups_.front()) std::memcpy(shared_ + copy.target, copy.data, copy.n_bytes);
      groups_.erase(groups_.begin());
    }
  }

  template <class T, int n, class Address, class Target>
  void load_matrix(Threads<T, n>& threads, Address address, Target target) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        int row_address = address(warp_ * 32 + matrix * 8 + lane / 4);
        std::memcpy(target(threads.of[lane]) + matrix, shared_ + row_address + lane % 4 * 4, 4);
      }
  }

  // By words: the emulation by bits and its layout are tested elsewhere.
  template <Math math, class T, class Fragments, int n>
  void multiply(Threads<T, n>& threads, Threads<Fragments, n>& fragments) {
    static_assert(math != Math::kAndBytes, "its barriers are those of kAndBits");
    using F = FragmentBits;
    constexpr int kDown = sizeof(Fragments::a) / 16, kAcross = sizeof(Fragments::b) / 8;
    uint32_t left[F::kM][F::kWords], right[F::kN][F::kWords];
    for (int i = 0; i < kDown; ++i)
      for (int j = 0; j < kAcross; ++j) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int r = 0; r < 4; ++r)
            left[F::a(lane, r, 0).row][F::a(lane, r, 0).col / 32] = fragments.of[lane].a[i][r];
          for (int r = 0; r < 2; ++r)
            right[F::b(lane, r, 0).col][F::b(lane, r, 0).row / 32] = fragments.of[lane].b[j][r];
        }
        for (int lane = 0; lane < 32; ++lane)
          for (int r = 0; r < 4; ++r) {
            Coordinate at = F::c(lane, r);
            for (int k = 0; k < F::kWords; ++k) {
              uint32_t x = left[at.row][k], w = right[at.col][k];
              threads.of[lane].count[i][j][r] += popcount(math == Math::kAndBits ? x & w : x ^ w);
            }
          }
      }
  }

  template <class T, int n, class Predicate, class Use>
  void ballot(Threads<T, n>& threads, Predicate predicate, Use use) {
    uint32_t word = 0;
    for (int lane = 0; lane < 32; ++lane)
      word |= (predicate(warp_ * 32 + lane, threads.of[lane]) ? 1u : 0u) << lane;
    for (int lane = 0; lane < 32; ++lane) use(warp_ * 32 + lane, threads.of[lane], word);
  }
  template <int width, class T, int n, class Pick>
  void sum_lanes(Threads<T, n>& threads, Pick pick) {
    for (int first = 0; first < 32; first += width) {
      int32_t sum = 0;
      for (int i = 0; i < width; ++i) sum += pick(threads.of[first + i]);
      for (int i = 0; i < width; ++i) pick(threads.of[first + i]) = sum;
    }
  }
  template <int width, class T, int n, class Pick>
  void or_lanes(Threads<T, n>& threads, Pick pick) {
    for (int first = 0; first < 32; first += width) {
      uint32_t all = 0;
      for (int i = 0; i < width; ++i) all |= pick(threads.of[first + i]);
      for (int i = 0; i < width; ++i) pick(threads.of[first + i]) = all;
    }
  }

  template <int n_words>
  void load_words(uint32_t (&to)[n_words], const uint32_t* from) {
    std::memcpy(to, from, 4 * n_words);
  }
  int popcount(uint32_t x) const { return __builtin_popcount(x); }
  template <class T, class U>
  T atomic_add(T* at, U x) {
    return __atomic_fetch_add(at, static_cast<T>(x), __ATOMIC_RELAXED);
  }
  void atomic_or(uint32_t* at, uint32_t x) { __atomic_fetch_or(at, x, __ATOMIC_RELAXED); }
  int32_t load_shared_by_blocks(const int32_t* at) const { return __atomic_load_n(at, __ATOMIC_RELAXED); }

 private:
  struct Copy {
    int target, n_bytes;
    unsigned char data[16];
  };

  unsigned char* shared_;
  Barriers* barriers_;
  int warp_, skipped_, n_syncs_ = 0;
  std::vector<Copy> open_;
  std::vector<std::vector<Copy>> groups_;
};

// Runs body(block) with `threads` / 32 warps at once; returns how many barriers it met.
template <class Body>
int run_warps(int threads, int shared_bytes, int skipped, Body body) {
  struct alignas(16) Line {
    unsigned char bytes[16];
  };
  std::vector<Line> memory(static_cast<size_t>(shared_bytes) / 16 + 2);
  std::memset(memory.data(), 0xA5, memory.size() * 16);
  unsigned char* shared = memory.front().bytes;
  Barriers barriers{threads / 32};
  std::vector<std::thread> warps;
  int n_syncs = 0;
  for (int warp = 0; warp < threads / 32; ++warp)
    warps.emplace_back([&, warp] {
      WarpBlock block(shared, &barriers, warp, skipped);
      body(block);
      if (warp == 0) n_syncs = block.n_syncs();
    });
  for (std::thread& warp : warps) warp.join();
  return n_syncs;
}

}  // namespace bop2nd::cuda
