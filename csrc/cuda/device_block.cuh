// SPDX-License-Identifier: Apache-2.0
// The vocabulary of kernel bodies on the GPU: one thread of a real block. Bodies are written as phases over
// all threads (`each`) and collectives (`multiply`, `load_matrix`, `ballot`, ...), so that tests/cpp can run
// the same text with an emulated block. Everything inlines; the lambdas leave no trace in the machine code.
#pragma once

#include "tile.h"

namespace bop2nd::cuda {

extern __shared__ __align__(128) unsigned char shared_memory[];

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error \
    "the kernels need compute capability 8.0: m16n8k256, cp.async, bf16 (build_cuda.py takes out what is below)"
#endif
#if defined(__CUDA_ARCH__)
constexpr Math kDeviceMath = math_of_arch(__CUDA_ARCH__);
constexpr bool kDeviceLean = is_lean(__CUDA_ARCH__);
#else
constexpr Math kDeviceMath = Math::kXorBits;  // the host pass only needs names
constexpr bool kDeviceLean = false;
#endif

struct DeviceBlock {
  template <class T, int n>
  using Threads = T;

  template <class T>
  __device__ __forceinline__ T* shared(int byte_offset) {
    return reinterpret_cast<T*>(shared_memory + byte_offset);
  }

  template <class T, class F>
  __device__ __forceinline__ void each(T& mine, F f) {
    f(static_cast<int>(threadIdx.x), mine);
  }
  template <class T, class U, class F>
  __device__ __forceinline__ void each(T& first, U& second, F f) {
    f(static_cast<int>(threadIdx.x), first, second);
  }
  __device__ __forceinline__ void sync() { __syncthreads(); }
  __device__ __forceinline__ void fence() { __threadfence(); }

  // `target` in bytes of shared memory; where the source does not exist zeros are written and nothing is read
  // (a source size of 0). Whole 16-byte vectors bypass L1.
  template <int n_bytes>
  __device__ __forceinline__ void copy_async(int target, const uint32_t* base, int32_t offset, bool exists) {
    uint32_t to = shared_address(target);
    const uint32_t* source = base + offset;
    int n_read = exists ? n_bytes : 0;
    if constexpr (n_bytes == 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(source), "r"(n_read)
                   : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(source), "n"(n_bytes),
                   "r"(n_read)
                   : "memory");
    }
  }
  __device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int n_pending>
  __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(n_pending) : "memory");
  }

  template <class T, class Address, class Target>
  __device__ __forceinline__ void load_matrix(T& mine, Address address, Target target) {
    uint32_t* to = target(mine);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(address(static_cast<int>(threadIdx.x))))
                 : "memory");
  }

  template <Math math, class T, class Fragments>
  __device__ __forceinline__ void multiply(T& mine, Fragments& fragments) {
    constexpr int kDown = sizeof(Fragments::a) / 16, kAcross = sizeof(Fragments::b) / 8;
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j) mma<math>(mine.count[i][j], fragments.a[i], fragments.b[j]);
  }

  template <class T, class Predicate, class Use>
  __device__ __forceinline__ void ballot(T& mine, Predicate predicate, Use use) {
    int thread = static_cast<int>(threadIdx.x);
    uint32_t word = __ballot_sync(0xFFFFFFFFu, predicate(thread, mine));
    use(thread, mine, word);
  }
  template <int width, class T, class Pick>
  __device__ __forceinline__ void sum_lanes(T& mine, Pick pick) {
#pragma unroll
    for (int step = width / 2; step > 0; step /= 2)
      pick(mine) += __shfl_xor_sync(0xFFFFFFFFu, pick(mine), step);
  }
  template <int width, class T, class Pick>
  __device__ __forceinline__ void or_lanes(T& mine, Pick pick) {
#pragma unroll
    for (int step = width / 2; step > 0; step /= 2)
      pick(mine) |= __shfl_xor_sync(0xFFFFFFFFu, pick(mine), step);
  }

  template <int n_words>
  __device__ __forceinline__ void load_words(uint32_t (&to)[n_words], const uint32_t* from) {
    if constexpr (n_words == 4) {
      uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else {
#pragma unroll
      for (int i = 0; i < n_words; ++i) to[i] = __ldg(from + i);
    }
  }
  __device__ __forceinline__ int popcount(uint32_t x) const { return __popc(x); }
  __device__ __forceinline__ int32_t atomic_add(int32_t* at, int32_t x) { return atomicAdd(at, x); }
  __device__ __forceinline__ uint32_t atomic_add(uint32_t* at, uint32_t x) { return atomicAdd(at, x); }
  __device__ __forceinline__ int64_t atomic_add(int64_t* at, int64_t x) {
    return static_cast<int64_t>(
        atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(x)));
  }
  __device__ __forceinline__ void atomic_or(uint32_t* at, uint32_t x) { atomicOr(at, x); }
  // Written by other blocks while this one ran: not from L1.
  __device__ __forceinline__ int32_t load_shared_by_blocks(const int32_t* at) const { return __ldcg(at); }

 private:
  static __device__ __forceinline__ uint32_t shared_address(int byte_offset) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) +
           static_cast<uint32_t>(byte_offset);
  }

  template <Math math>
  static __device__ __forceinline__ void mma(int32_t (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
#define BOP2ND_MMA(instruction)                                                      \
  asm(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if constexpr (math == Math::kXorBits) {
      BOP2ND_MMA("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.xor.popc");
    } else if constexpr (math == Math::kAndBits) {
      BOP2ND_MMA("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc");
    } else {
      BOP2ND_MMA("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32");
    }
#undef BOP2ND_MMA
  }
};

}  // namespace bop2nd::cuda
