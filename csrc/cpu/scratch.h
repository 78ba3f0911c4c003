// SPDX-License-Identifier: Apache-2.0
// Memory of a thread for what a call plans: a stack that keeps up to kScratchKept of what it has grown to, so
// that a call like one before takes nothing from the system.
#pragma once

#include <cstddef>
#include <vector>

namespace bop2nd {

constexpr size_t kScratchKept = size_t{4} << 20;

// What is taken while it lives is given back at its end. Scopes of a thread lie within each other, and a
// vector grows only while its own scope is the innermost one.
class ScratchScope {
 public:
  ScratchScope();
  ~ScratchScope();
  ScratchScope(const ScratchScope&) = delete;
  ScratchScope& operator=(const ScratchScope&) = delete;

 private:
  size_t block_, used_;
};

// On a cache line. Throws std::bad_alloc.
void* take_scratch(size_t n_bytes);

template <class T>
struct ScratchAllocator {
  using value_type = T;
  ScratchAllocator() = default;
  template <class U>
  ScratchAllocator(const ScratchAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(take_scratch(n * sizeof(T))); }
  void deallocate(T*, size_t) {}
  template <class U>
  bool operator==(const ScratchAllocator<U>&) const {
    return true;
  }
  template <class U>
  bool operator!=(const ScratchAllocator<U>&) const {
    return false;
  }
};

template <class T>
using ScratchVector = std::vector<T, ScratchAllocator<T>>;

}  // namespace bop2nd
