// SPDX-License-Identifier: Apache-2.0
// Memory on cache lines, not initialized; and weights prepared once for all contexts of a network.
#pragma once

#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace bop2nd::runtime {

template <class T>
class Aligned {
 public:
  Aligned() = default;
  explicit Aligned(size_t n) : n_(n) {
    if (n == 0) return;
    size_t bytes;
    if (__builtin_mul_overflow(n, sizeof(T), &bytes) || bytes > SIZE_MAX - 64) throw std::bad_alloc();
    data_.reset(static_cast<T*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
    if (!data_) throw std::bad_alloc();
  }
  T* data() const { return data_.get(); }
  size_t size() const { return n_; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  size_t n_ = 0;
};

using Words = Aligned<uint32_t>;
using Kept = std::shared_ptr<const uint32_t>;  // owns the memory, unless the caller does

class Prepared {
 public:
  // By the memory they come from, and by all numbers that say how they are laid: one constant may be the
  // weight of several products, with other shapes.
  using Key = std::pair<const void*, std::vector<int64_t>>;

  template <class Make>
  Kept get(const Key& key, const Make& make) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = made_.find(key);
    if (found == made_.end()) {
      auto words = std::make_shared<const Words>(make());
      found = made_.emplace(key, Kept(words, words->data())).first;
    }
    return found->second;
  }

  // What the caller has prepared, and keeps.
  void put(const Key& key, const uint32_t* words) {
    std::lock_guard<std::mutex> lock(mutex_);
    made_.emplace(key, Kept(Kept(), words));
  }

 private:
  std::mutex mutex_;
  std::map<Key, Kept> made_;
};

// Of weights as prepack_weight (csrc/cpu/operators.h) lays them.
inline Prepared::Key blocked_key(const void* weight, int64_t groups) { return {weight, {0, groups}}; }

}  // namespace bop2nd::runtime
