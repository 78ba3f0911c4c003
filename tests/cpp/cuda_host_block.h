// SPDX-License-Identifier: Apache-2.0
// An emulated block of threads: the vocabulary of csrc/cuda/device_block.cuh on the host, so that kernel
// bodies run here with the same coordinates. Phases replace concurrency: `each` runs one thread after the
// other, collectives see all lanes. Asynchronous copies land only when waited for; their target is poisoned
// the moment they are issued, so that reading too early or overwriting too early both show. The mma is
// executed element by element from the fragment layouts.
#pragma once

#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cuda/fragment.h"

namespace bop2nd::cuda {

// Executes D += popc(A op B) for one warp, bit by bit.
inline void emulate_mma_bits(bool use_and, const uint32_t (&a)[32][4], const uint32_t (&b)[32][2],
                             int32_t (&c)[32][4]) {
  using F = FragmentBits;
  static thread_local uint8_t left[F::kM][F::kK], right[F::kN][F::kK];
  for (int lane = 0; lane < 32; ++lane)
    for (int bit = 0; bit < 32; ++bit) {
      for (int r = 0; r < 4; ++r) {
        Coordinate at = F::a(lane, r, bit);
        left[at.row][at.col] = (a[lane][r] >> bit) & 1;
      }
      for (int r = 0; r < 2; ++r) {
        Coordinate at = F::b(lane, r, bit);
        right[at.col][at.row] = (b[lane][r] >> bit) & 1;
      }
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int r = 0; r < 4; ++r) {
      Coordinate at = F::c(lane, r);
      int sum = 0;
      for (int k = 0; k < F::kK; ++k) {
        sum += use_and ? left[at.row][k] & right[at.col][k] : left[at.row][k] ^ right[at.col][k];
      }
      c[lane][r] += sum;
    }
}

// D += A * B of unsigned bytes for one warp.
inline void emulate_mma_bytes(const uint32_t (&a)[32][4], const uint32_t (&b)[32][2], int32_t (&c)[32][4]) {
  uint8_t left[16][FragmentBytes::kK], right[8][FragmentBytes::kK];
  for (int lane = 0; lane < 32; ++lane)
    for (int byte = 0; byte < 4; ++byte) {
      for (int r = 0; r < 4; ++r) {
        Coordinate at = FragmentBytes::a(lane, r, byte);
        left[at.row][at.col] = static_cast<uint8_t>(a[lane][r] >> (8 * byte));
      }
      for (int r = 0; r < 2; ++r) {
        Coordinate at = FragmentBytes::b(lane, r, byte);
        right[at.col][at.row] = static_cast<uint8_t>(b[lane][r] >> (8 * byte));
      }
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int r = 0; r < 4; ++r) {
      Coordinate at = FragmentBits::c(lane, r);
      for (int k = 0; k < FragmentBytes::kK; ++k) c[lane][r] += left[at.row][k] * right[at.col][k];
    }
}

class HostBlock {
 public:
  template <class T, int n>
  class Threads {
   public:
    Threads() : of(n) {}
    std::vector<T> of;
  };

  explicit HostBlock(int shared_bytes) : shared_(static_cast<size_t>(shared_bytes) / 16 + 2) {
    std::memset(shared_.data(), 0xA5, shared_.size() * 16);
  }
  template <class T>
  T* shared(int byte_offset) {
    return reinterpret_cast<T*>(bytes() + byte_offset);
  }

  template <class T, int n, class F>
  void each(Threads<T, n>& threads, F f) {
    for (int t = 0; t < n; ++t) f(t, threads.of[t]);
  }
  template <class T, class U, int n, class F>
  void each(Threads<T, n>& first, Threads<U, n>& second, F f) {
    for (int t = 0; t < n; ++t) f(t, first.of[t], second.of[t]);
  }
  void sync() {}
  void fence() {}

  template <int n_bytes>
  void copy_async(int target, const uint32_t* base, int32_t offset, bool exists) {
    uintptr_t source = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(int64_t{4} * offset);
    if (target % n_bytes != 0 || source % n_bytes != 0) std::abort();
    Copy copy{target, n_bytes, {}};
    if (exists) std::memcpy(copy.data, reinterpret_cast<const void*>(source), n_bytes);
    std::memset(bytes() + target, 0x5A, n_bytes);
    open_.push_back(copy);
  }
  void commit_copies() {
    groups_.push_back(open_);
    open_.clear();
  }
  template <int n_pending>
  void wait_copies() {
    while (groups_.size() > n_pending) {
      for (const Copy& copy : groups_.front()) std::memcpy(bytes() + copy.target, copy.data, copy.n_bytes);
      groups_.erase(groups_.begin());
    }
  }

  template <class T, int n, class Address, class Target>
  void load_matrix(Threads<T, n>& threads, Address address, Target target) {
    for (int warp = 0; warp < n / 32; ++warp)
      for (int lane = 0; lane < 32; ++lane)
        for (int matrix = 0; matrix < 4; ++matrix) {
          int row_address = address(warp * 32 + matrix * 8 + lane / 4);
          if (row_address % 16 != 0) std::abort();
          std::memcpy(target(threads.of[warp * 32 + lane]) + matrix, bytes() + row_address + lane % 4 * 4, 4);
        }
  }

  template <Math math, class T, class Fragments, int n>
  void multiply(Threads<T, n>& threads, Threads<Fragments, n>& fragments) {
    constexpr int kDown = sizeof(Fragments::a) / 16, kAcross = sizeof(Fragments::b) / 8;
    uint32_t a[32][4], b[32][2];
    int32_t c[32][4];
    for (int warp = 0; warp < n / 32; ++warp)
      for (int i = 0; i < kDown; ++i)
        for (int j = 0; j < kAcross; ++j) {
          for (int lane = 0; lane < 32; ++lane) {
            std::memcpy(a[lane], fragments.of[warp * 32 + lane].a[i], 16);
            std::memcpy(b[lane], fragments.of[warp * 32 + lane].b[j], 8);
            std::memcpy(c[lane], threads.of[warp * 32 + lane].count[i][j], 16);
          }
          if (math == Math::kAndBytes) {
            emulate_mma_bytes(a, b, c);
          } else {
            emulate_mma_bits(math == Math::kAndBits, a, b, c);
          }
          for (int lane = 0; lane < 32; ++lane)
            std::memcpy(threads.of[warp * 32 + lane].count[i][j], c[lane], 16);
        }
  }

  template <class T, int n, class Predicate, class Use>
  void ballot(Threads<T, n>& threads, Predicate predicate, Use use) {
    for (int warp = 0; warp < n / 32; ++warp) {
      uint32_t word = 0;
      for (int lane = 0; lane < 32; ++lane) {
        word |= (predicate(warp * 32 + lane, threads.of[warp * 32 + lane]) ? 1u : 0u) << lane;
      }
      for (int lane = 0; lane < 32; ++lane) use(warp * 32 + lane, threads.of[warp * 32 + lane], word);
    }
  }
  template <int width, class T, int n, class Pick>
  void sum_lanes(Threads<T, n>& threads, Pick pick) {
    for (int first = 0; first < n; first += width) {
      int32_t sum = 0;
      for (int i = 0; i < width; ++i) sum += pick(threads.of[first + i]);
      for (int i = 0; i < width; ++i) pick(threads.of[first + i]) = sum;
    }
  }
  template <int width, class T, int n, class Pick>
  void or_lanes(Threads<T, n>& threads, Pick pick) {
    for (int first = 0; first < n; first += width) {
      uint32_t sum = 0;
      for (int i = 0; i < width; ++i) sum |= pick(threads.of[first + i]);
      for (int i = 0; i < width; ++i) pick(threads.of[first + i]) = sum;
    }
  }

  template <int n_words>
  void load_words(uint32_t (&to)[n_words], const uint32_t* from) {
    if (reinterpret_cast<uintptr_t>(from) % (4 * n_words) != 0) std::abort();
    std::memcpy(to, from, 4 * n_words);
  }
  int popcount(uint32_t x) const { return __builtin_popcount(x); }
  template <class T, class U>
  T atomic_add(T* at, U x) {
    T old = *at;
    *at = static_cast<T>(old + static_cast<T>(x));
    return old;
  }
  void atomic_or(uint32_t* at, uint32_t x) { *at |= x; }
  int32_t load_shared_by_blocks(const int32_t* at) const { return *at; }

 private:
  struct alignas(16) Line {
    unsigned char bytes[16];
  };
  struct Copy {
    int target, n_bytes;
    unsigned char data[16];
  };
  unsigned char* bytes() { return reinterpret_cast<unsigned char*>(shared_.data()); }

  std::vector<Line> shared_;
  std::vector<Copy> open_;
  std::vector<std::vector<Copy>> groups_;
};

}  // namespace bop2nd::cuda
