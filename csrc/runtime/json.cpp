// SPDX-License-Identifier: Apache-2.0
#include "json.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <system_error>

#include "error.h"

namespace bop2nd::runtime {
namespace {

constexpr int kDepth = 128;

// The length of a UTF-8 sequence at `p`, 0 if it is none: no overlong forms, surrogates, or beyond U+10FFFF.
size_t utf8_length(const unsigned char* p, size_t left) {
  auto next = [&](size_t i) { return i < left && (p[i] & 0xC0) == 0x80; };
  if (p[0] < 0x80) return 1;
  if (p[0] >= 0xC2 && p[0] <= 0xDF) return next(1) ? 2 : 0;
  if ((p[0] & 0xF0) == 0xE0) {
    bool fits = !(p[0] == 0xE0 && left > 1 && p[1] < 0xA0) && !(p[0] == 0xED && left > 1 && p[1] > 0x9F);
    return fits && next(1) && next(2) ? 3 : 0;
  }
  if (p[0] >= 0xF0 && p[0] <= 0xF4) {
    bool fits = !(p[0] == 0xF0 && left > 1 && p[1] < 0x90) && !(p[0] == 0xF4 && left > 1 && p[1] > 0x8F);
    return fits && next(1) && next(2) && next(3) ? 4 : 0;
  }
  return 0;
}

void append_utf8(std::string& to, uint32_t code) {
  auto put = [&to](uint32_t byte) { to.push_back(static_cast<char>(byte)); };
  if (code < 0x80) return put(code);
  if (code < 0x800) return put(0xC0 | code >> 6), put(0x80 | (code & 0x3F));
  if (code < 0x10000)
    return put(0xE0 | code >> 12), put(0x80 | (code >> 6 & 0x3F)), put(0x80 | (code & 0x3F));
  put(0xF0 | code >> 18), put(0x80 | (code >> 12 & 0x3F)), put(0x80 | (code >> 6 & 0x3F));
  put(0x80 | (code & 0x3F));
}

class Parser {
 public:
  explicit Parser(std::string_view text) : at_(text.data()), begin_(at_), end_(at_ + text.size()) {}

  Json document() {
    Json value = parse(0);
    skip();
    check(at_ == end_, "something follows the value");
    return value;
  }

 private:
  const char *at_, *begin_, *end_;

  void check(bool kept, const char* what) const {
    require(kept, "damaged or not a packed model: its JSON is malformed at byte ", at_ - begin_, ": ", what);
  }
  void skip() {
    while (at_ < end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\t' || *at_ == '\r')) ++at_;
  }
  bool take(char c) {
    skip();
    if (at_ == end_ || *at_ != c) return false;
    ++at_;
    return true;
  }
  bool take_word(const char* word) {
    size_t n = std::strlen(word);
    if (static_cast<size_t>(end_ - at_) < n || std::memcmp(at_, word, n) != 0) return false;
    at_ += n;
    return true;
  }

  Json parse(int depth) {
    check(depth <= kDepth, "nested too deeply");
    skip();
    check(at_ < end_, "it ends early");
    Json value;
    switch (*at_) {
      case '{':
        object(value, depth);
        break;
      case '[':
        list(value, depth);
        break;
      case '"':
        value.kind = Json::Kind::kText;
        value.text = string();
        break;
      case 'n':
        check(take_word("null"), "an unknown word");
        break;
      case 't':
        check(take_word("true"), "an unknown word");
        value.kind = Json::Kind::kTrue;
        break;
      case 'f':
        check(take_word("false"), "an unknown word");
        value.kind = Json::Kind::kFalse;
        break;
      default:
        number(value);
    }
    return value;
  }

  void list(Json& value, int depth) {
    value.kind = Json::Kind::kList;
    ++at_;
    if (take(']')) return;
    do value.items.push_back(parse(depth + 1));
    while (take(','));
    check(take(']'), "a list has no end");
  }

  void object(Json& value, int depth) {
    value.kind = Json::Kind::kObject;
    ++at_;
    if (take('}')) return;
    do {
      skip();
      check(at_ < end_ && *at_ == '"', "a key is no text");
      value.keys.push_back(string());
      check(take(':'), "a key has no value");
      value.items.push_back(parse(depth + 1));
    } while (take(','));
    check(take('}'), "an object has no end");
    value.order.resize(value.keys.size());
    for (uint32_t i = 0; i < value.order.size(); ++i) value.order[i] = i;
    const std::vector<std::string>& keys = value.keys;
    std::sort(value.order.begin(), value.order.end(),
              [&](uint32_t a, uint32_t b) { return keys[a] < keys[b]; });
    for (size_t i = 1; i < value.order.size(); ++i)
      check(keys[value.order[i - 1]] != keys[value.order[i]], "a key stands twice in one object");
  }

  uint32_t hex4() {
    check(end_ - at_ >= 4, "a text has no end");
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      char c = *at_;
      bool digit = c >= '0' && c <= '9', low = c >= 'a' && c <= 'f', high = c >= 'A' && c <= 'F';
      check(digit || low || high, "an escape is no number");
      code = code * 16 + static_cast<uint32_t>(digit ? c - '0' : low ? c - 'a' + 10 : c - 'A' + 10);
    }
    return code;
  }

  void escape(std::string& to) {
    check(at_ < end_, "a text has no end");
    char c = *at_++;
    static const char kFrom[] = "\"\\/bfnrt", kTo[] = "\"\\/\b\f\n\r\t";
    if (const char* found = c ? std::strchr(kFrom, c) : nullptr) return to.push_back(kTo[found - kFrom]);
    check(c == 'u', "an unknown escape");
    uint32_t code = hex4();
    check(code < 0xDC00 || code > 0xDFFF, "half a surrogate pair");
    if (code >= 0xD800 && code <= 0xDBFF) {
      check(take_word("\\u"), "half a surrogate pair");
      uint32_t low = hex4();
      check(low >= 0xDC00 && low <= 0xDFFF, "half a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    append_utf8(to, code);
  }

  std::string string() {
    ++at_;
    std::string text;
    while (true) {
      const char* from = at_;
      while (at_ < end_ && *at_ != '"' && *at_ != '\\') {
        unsigned char c = static_cast<unsigned char>(*at_);
        check(c >= 0x20, "a control character in a text");
        size_t n = utf8_length(reinterpret_cast<const unsigned char*>(at_), static_cast<size_t>(end_ - at_));
        check(n > 0, "a text that is not UTF-8");
        at_ += n;
      }
      text.append(from, at_);
      check(at_ < end_, "a text has no end");
      if (*at_++ == '"') return text;
      escape(text);
    }
  }

  void digits(std::string& to) {
    check(at_ < end_ && *at_ >= '0' && *at_ <= '9', "no value");
    while (at_ < end_ && *at_ >= '0' && *at_ <= '9') to.push_back(*at_++);
  }

  void number(Json& value) {
    std::string text;
    if (*at_ == '-') text.push_back(*at_++);
    size_t first = text.size();
    digits(text);
    check(text[first] != '0' || text.size() == first + 1, "a number starts with 0");
    bool whole = true;
    if (at_ < end_ && *at_ == '.') text.push_back(*at_++), digits(text), whole = false;
    if (at_ < end_ && (*at_ == 'e' || *at_ == 'E')) {
      text.push_back(*at_++), whole = false;
      if (at_ < end_ && (*at_ == '+' || *at_ == '-')) text.push_back(*at_++);
      digits(text);
    }
    if (whole) return integer(value, text);
    check(text.size() <= 400, "a number of too many digits");
    value.kind = Json::Kind::kReal;
    const char* end = text.data() + text.size();
    auto [stop, error] = std::from_chars(text.data(), end, value.real);
    size_t exponent = text.find_first_of("eE");
    bool small = exponent == text.npos ? text.find('.') < 20 : text[exponent + 1] == '-';
    bool tiny = small && error == std::errc::result_out_of_range;  // 0 is the nearest number
    check((error == std::errc() && stop == end) || tiny, "a number beyond binary64");
  }

  void integer(Json& value, const std::string& text) {
    value.kind = Json::Kind::kInteger;
    bool negative = text[0] == '-';
    for (size_t i = negative; i < text.size(); ++i) {
      bool fits = !__builtin_mul_overflow(value.integer, int64_t{10}, &value.integer) &&
                  !__builtin_add_overflow(value.integer, int64_t{negative ? '0' - text[i] : text[i] - '0'},
                                          &value.integer);
      check(fits, "an integer beyond 64 bits");
    }
  }
};

}  // namespace

Json parse_json(std::string_view text) { return Parser(text).document(); }

const Json* Json::find(std::string_view key) const {
  auto at = std::lower_bound(order.begin(), order.end(), key, [this](uint32_t i, std::string_view wanted) {
    return std::string_view(keys[i]) < wanted;
  });
  return at != order.end() && keys[*at] == key ? &items[*at] : nullptr;
}

const std::string& Json::as_text(const char* what) const {
  require(is(Kind::kText), what, " is no text");
  return text;
}

int64_t Json::as_integer(const char* what, int64_t least, int64_t most) const {
  require(is(Kind::kInteger) && integer >= least && integer <= most, what, " is no integer from ", least,
          " to ", most);
  return integer;
}

bool Json::as_bool(const char* what) const {
  require(is_bool(), what, " is neither true nor false");
  return is(Kind::kTrue);
}

const std::vector<Json>& Json::as_list(const char* what) const {
  require(is(Kind::kList), what, " is no list");
  return items;
}

const Json& Json::as_object(const char* what) const {
  require(is(Kind::kObject), what, " is no JSON object");
  return *this;
}

const Json& Json::at(std::string_view key, const char* what) const {
  const Json* found = as_object(what).find(key);
  require(found, what, " has no field '", key, "'");
  return *found;
}

void Json::check_size(size_t n, const char* what) const {
  require(as_object(what).keys.size() == n, what, " has ", keys.size(), " fields, not ", n);
}

std::string printable(std::string_view text) {
  std::string shown;
  for (char c : text.substr(0, 64)) shown.push_back(c >= 0x20 && c < 0x7F ? c : '?');
  return shown + (text.size() > 64 ? "..." : "");
}

}  // namespace bop2nd::runtime
