// SPDX-License-Identifier: Apache-2.0
// SHA-256 (FIPS 180-4).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace bop2nd::runtime {

class Sha256 {
 public:
  void add(const void* bytes, size_t n);
  void add(std::string_view text) { add(text.data(), text.size()); }
  void add_uint64(uint64_t value);  // little-endian
  std::string hexadecimal();        // ends it

 private:
  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint8_t block_[64];
  size_t filled_ = 0;
  uint64_t n_bytes_ = 0;

  void compress(const uint8_t* block);
};

}  // namespace bop2nd::runtime
