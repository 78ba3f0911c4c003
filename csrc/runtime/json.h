// SPDX-License-Identifier: Apache-2.0
// JSON as packed files use it, strictly: UTF-8; no key twice, NaN, integers beyond 64 bits, numbers beyond
// binary64, or nesting above 128. Takes time linear in the text, keys of one object are sorted.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace bop2nd::runtime {

struct Json {
  enum class Kind : uint8_t { kNull, kFalse, kTrue, kInteger, kReal, kText, kList, kObject };
  Kind kind = Kind::kNull;
  int64_t integer = 0;
  double real = 0;
  std::string text;
  std::vector<Json> items;        // of a list; values of an object
  std::vector<std::string> keys;  // of an object, in the order of the text
  std::vector<uint32_t> order;    // of its keys, sorted

  bool is(Kind other) const { return kind == other; }
  bool is_bool() const { return is(Kind::kFalse) || is(Kind::kTrue); }
  // The value of a key, or null.
  const Json* find(std::string_view key) const;

  // Throw an Error that names `what` where the value is another one.
  const std::string& as_text(const char* what) const;
  int64_t as_integer(const char* what, int64_t least, int64_t most) const;
  bool as_bool(const char* what) const;
  const std::vector<Json>& as_list(const char* what) const;
  const Json& as_object(const char* what) const;
  // The value of a key that must be there.
  const Json& at(std::string_view key, const char* what) const;
  // Exactly n keys.
  void check_size(size_t n, const char* what) const;
};

Json parse_json(std::string_view text);

// A text from the file, so that an error message can show it.
std::string printable(std::string_view text);

}  // namespace bop2nd::runtime
