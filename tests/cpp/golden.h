// SPDX-License-Identifier: Apache-2.0
// The golden packed files of tests/data: files as bytes, the arrays of .npz, and the numbers of
// tests/packed_models.py, which are their inputs.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "check_macro.h"

inline std::vector<uint8_t> bytes_of(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "rb");
  CHECK(file, "%s", path.c_str());
  std::vector<uint8_t> bytes;
  uint8_t part[4096];
  for (size_t n; (n = std::fread(part, 1, sizeof part, file)) > 0;) bytes.insert(bytes.end(), part, part + n);
  std::fclose(file);
  return bytes;
}

struct GoldenArray {
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<uint8_t> bytes;
};

// Of one .npy: its header is a Python literal.
inline GoldenArray read_npy(const uint8_t* p, size_t n) {
  size_t header = p[8] | p[9] << 8;
  std::string text(reinterpret_cast<const char*>(p) + 10, header);
  GoldenArray array;
  size_t at = text.find("'descr': '") + 10;
  array.dtype = text.substr(at, text.find('\'', at) - at);
  at = text.find("'shape': (") + 10;
  for (const char* c = text.c_str() + at; *c != ')';) {
    char* end;
    long size = std::strtol(c, &end, 10);
    if (end == c) {
      ++c;
      continue;
    }
    array.shape.push_back(size), c = end;
  }
  array.bytes.assign(p + 10 + header, p + n);
  return array;
}

// Arrays "0", "1" ... of an .npz whose members are stored as they are.
inline std::vector<GoldenArray> read_npz(const std::string& path) {
  std::vector<uint8_t> file = bytes_of(path);
  auto number = [&](size_t at, int n) {
    uint64_t value = 0;
    for (int i = 0; i < n; ++i) value |= uint64_t{file[at + static_cast<size_t>(i)]} << (8 * i);
    return static_cast<size_t>(value);
  };
  size_t end = file.size() - 22, n_members = number(end + 10, 2), at = number(end + 16, 4);
  std::map<int, GoldenArray> arrays;
  for (size_t i = 0; i < n_members; ++i) {
    size_t size = number(at + 24, 4), name = number(at + 28, 2), extra = number(at + 30, 2);
    size_t comment = number(at + 32, 2), local = number(at + 42, 4);
    CHECK(number(at + 10, 2) == 0, "%s is compressed", path.c_str());
    size_t data = local + 30 + number(local + 26, 2) + number(local + 28, 2);
    int index =
        std::atoi(std::string(file.begin() + static_cast<std::ptrdiff_t>(at) + 46, file.end()).c_str());
    arrays[index] = read_npy(file.data() + data, size);
    at += 46 + name + extra + comment;
  }
  std::vector<GoldenArray> list;
  for (auto& [index, array] : arrays) list.push_back(std::move(array));
  return list;
}

// `values` of tests/packed_models.py.
inline std::vector<float> golden_values(int64_t n, int64_t seed) {
  std::vector<float> values;
  for (int64_t i = 0; i < n; ++i) {
    uint64_t step = static_cast<uint64_t>((i * 7919 + seed * 104729) * 2654435761) % (uint64_t{1} << 32) >> 9;
    values.push_back(static_cast<float>(static_cast<int64_t>(step % 25) - 12) / 4);
  }
  return values;
}
