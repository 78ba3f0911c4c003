// SPDX-License-Identifier: Apache-2.0
// The container of a packed file (docs/packed_file.md, sections 1 and 2): metadata and tensors, checked.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace bop2nd::runtime {

using Sizes = std::vector<int64_t>;
constexpr size_t kMaxAxes = 16;
int64_t product(const Sizes& sizes);
// The product with 1 for every 0, which bounds what strides and counts of the axes in any order can be.
// Negative if that is 2^48 or more, a size is negative, or there are more than kMaxAxes: no shape to compute
// with.
int64_t extent(const Sizes& shape);

enum class Type : uint8_t { kF64, kF32, kF16, kBF16, kI64, kI32, kI16, kI8, kU8, kBool };
int64_t bytes_of(Type type);
const char* name_of(Type type);  // "float32"

// A tensor in memory that somebody else keeps; row-major.
struct Stored {
  Type type = Type::kF32;
  Sizes shape;
  const void* data = nullptr;

  int64_t count() const { return product(shape); }
  int64_t n_bytes() const { return count() * bytes_of(type); }
};

using StoredTensors = std::map<std::string, Stored, std::less<>>;

struct PackedTensors {
  std::string graph;
  StoredTensors tensors;
  std::vector<std::vector<uint64_t>> copies;  // of what did not lie on its alignment
};

// The bytes, which start on 8 bytes, must stay.
PackedTensors read_tensors(const uint8_t* bytes, size_t n_bytes);

// A file in memory.
class MappedFile {
 public:
  MappedFile(const char* path, uint64_t limit);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace bop2nd::runtime
