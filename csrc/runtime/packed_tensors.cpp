// SPDX-License-Identifier: Apache-2.0
#include "packed_tensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "error.h"
#include "json.h"
#include "sha256.h"

namespace bop2nd::runtime {
namespace {

constexpr uint64_t kHeaderLimit = uint64_t{1} << 24;
constexpr const char* kFormat = "bop2nd_fast.packed_model";
constexpr const char* kNames[] = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"};
constexpr int64_t kBytes[] = {8, 4, 2, 2, 8, 4, 2, 1, 1, 1};

Type type_of(const std::string& name) {
  for (int i = 0; i < 10; ++i) {
    if (name == kNames[i]) return static_cast<Type>(i);
  }
  fail(Status::kFile, "a tensor is of unknown dtype '", printable(name), "'");
}

struct Place {
  Type type;
  Sizes shape;
  int64_t begin, end;
};

Place place_of(const std::string& name, const Json& entry, int64_t body) {
  entry.check_size(3, "a tensor's description");
  Place place{};
  place.type = type_of(entry.at("dtype", "a tensor").as_text("a dtype"));
  const std::vector<Json>& shape = entry.at("shape", "a tensor").as_list("a shape");
  require(shape.size() <= kMaxAxes, "tensor '", printable(name), "' has more than ", kMaxAxes, " axes");
  for (const Json& size : shape)
    place.shape.push_back(size.as_integer("a tensor's size", 0, (int64_t{1} << 48) - 1));
  require(extent(place.shape) > 0, "tensor '", printable(name), "' has too large a shape");
  const std::vector<Json>& offsets = entry.at("data_offsets", "a tensor").as_list("data_offsets");
  require(offsets.size() == 2, "data_offsets are not two numbers");
  place.begin = offsets[0].as_integer("an offset", 0, body);
  place.end = offsets[1].as_integer("an offset", place.begin, body);
  require(place.end - place.begin == product(place.shape) * bytes_of(place.type), "tensor '", printable(name),
          "' does not have the bytes that its shape takes");
  return place;
}

void check_kind(const Json& metadata) {
  auto text = [&](const char* key) {
    const Json* value = metadata.find(key);
    return value && value->is(Json::Kind::kText) ? value->text : std::string();
  };
  require(text("format") == kFormat, "a safetensors file, but not a packed model");
  std::string version = text("version");
  bool digits = !version.empty() && version.size() <= 9 &&
                std::all_of(version.begin(), version.end(), [](char c) { return c >= '0' && c <= '9'; });
  require(digits, "damaged: '", printable(version), "' is not a format version");
  if (std::stol(version) > 2)
    fail(Status::kUnsupported, "it has format version ", version, "; this runtime reads 2: use a newer one");
  require(version == "2", "it has format version ", version, ", which does not exist");
  metadata.check_size(5, "the metadata");
  std::string profile = text("profile");
  if (profile == "torch")
    fail(Status::kUnsupported, "it is of profile 'torch': it needs operators that only torch has");
  require(profile == "bits", "it is of unknown profile '", printable(profile), "'");
}

std::string checksum(const Json& metadata, const StoredTensors& tensors) {
  Sha256 hash;
  for (const char* key : {"version", "profile", "graph"}) {
    hash.add(metadata.at(key, "the metadata").as_text(key));
    hash.add("\0", 1);
  }
  for (const auto& [name, tensor] : tensors) {
    hash.add(name), hash.add("\0", 1);
    hash.add(kNames[static_cast<int>(tensor.type)]), hash.add("\0", 1);
    hash.add_uint64(tensor.shape.size());
    for (int64_t size : tensor.shape) hash.add_uint64(static_cast<uint64_t>(size));
    if (tensor.n_bytes() > 0) hash.add(tensor.data, static_cast<size_t>(tensor.n_bytes()));
  }
  return hash.hexadecimal();
}

}  // namespace

int64_t bytes_of(Type type) { return kBytes[static_cast<int>(type)]; }

const char* name_of(Type type) {
  constexpr const char* kNames[] = {"float64", "float32", "float16", "bfloat16", "int64",
                                    "int32",   "int16",   "int8",    "uint8",    "bool"};
  return kNames[static_cast<int>(type)];
}

int64_t product(const Sizes& sizes) {
  int64_t n = 1;
  for (int64_t size : sizes) n *= size;
  return n;
}

int64_t extent(const Sizes& shape) {
  if (shape.size() > kMaxAxes) return -1;
  int64_t n = 1;
  for (int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(n, std::max<int64_t>(1, size), &n) || n >= int64_t{1} << 48)
      return -1;
  }
  return n;
}

PackedTensors read_tensors(const uint8_t* bytes, size_t n_bytes) {
  uint64_t length = 0;
  for (size_t i = 0; i < 8 && i < n_bytes; ++i) length |= uint64_t{bytes[i]} << (8 * i);
  require(n_bytes >= 8 && length <= n_bytes - 8, "damaged or not a packed model: it ends inside its header");
  require(length <= kHeaderLimit, "not a packed model: a header of ", length, " bytes, ", kHeaderLimit,
          " are allowed");
  Json header = parse_json({reinterpret_cast<const char*>(bytes) + 8, static_cast<size_t>(length)});
  const Json& metadata = header.at("__metadata__", "the header").as_object("the metadata");
  check_kind(metadata);
  const uint8_t* body = bytes + 8 + length;
  int64_t body_bytes = static_cast<int64_t>(n_bytes - 8 - length);

  PackedTensors read;
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (size_t i = 0; i < header.keys.size(); ++i) {
    if (&header.items[i] == &metadata) continue;
    Place place = place_of(header.keys[i], header.items[i], body_bytes);
    ranges.emplace_back(place.begin, place.end);
    Stored stored{.type = place.type, .shape = place.shape, .data = body + place.begin};
    if (reinterpret_cast<uintptr_t>(stored.data) % static_cast<uintptr_t>(bytes_of(place.type)) != 0) {
      size_t n = static_cast<size_t>(place.end - place.begin);
      read.copies.emplace_back((n + 7) / 8);
      if (n > 0) std::memcpy(read.copies.back().data(), stored.data, n);
      stored.data = read.copies.back().data();
    }
    if (place.type == Type::kBool) {
      const uint8_t* values = static_cast<const uint8_t*>(stored.data);
      bool valid = std::all_of(values, values + stored.n_bytes(), [](uint8_t value) { return value <= 1; });
      require(valid, "a tensor has truth values other than 0 and 1");
    }
    read.tensors.emplace(header.keys[i], std::move(stored));
  }
  std::sort(ranges.begin(), ranges.end());
  int64_t at = 0;
  for (auto [begin, end] : ranges) {
    require(begin == at, "damaged: a tensor starts at byte ", begin, ", ", at, " was expected");
    at = end;
  }
  require(at == body_bytes, "damaged: ", body_bytes, " bytes of tensors, ", at, " are described");
  require(checksum(metadata, read.tensors) == metadata.at("sha256", "the metadata").as_text("sha256"),
          "it was altered after it was written: its checksum does not match");
  read.graph = metadata.at("graph", "the metadata").text;
  return read;
}

MappedFile::MappedFile(const char* path, uint64_t limit) {
  int handle = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  if (handle < 0) fail(Status::kIo, path, ": ", std::strerror(errno));
  struct stat status{};
  bool known = fstat(handle, &status) == 0;
  if (!known || !S_ISREG(status.st_mode)) {
    close(handle);
    fail(Status::kIo, path, ": not a regular file");
  }
  size_ = static_cast<size_t>(status.st_size);
  if (static_cast<uint64_t>(status.st_size) > limit) {
    close(handle);
    fail(Status::kLimit, path, ": a file of ", size_, " bytes, ", limit, " are allowed");
  }
  void* mapped = size_ > 0 ? mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, handle, 0) : nullptr;
  int error = errno;
  close(handle);
  if (mapped == MAP_FAILED) fail(Status::kIo, path, ": cannot be mapped: ", std::strerror(error));
  data_ = static_cast<const uint8_t*>(mapped);
}

MappedFile::~MappedFile() {
  if (data_) munmap(const_cast<uint8_t*>(data_), size_);
}

}  // namespace bop2nd::runtime
