// SPDX-License-Identifier: Apache-2.0
// What goes wrong inside the runtime: thrown, and turned into a status where the C API returns.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace bop2nd::runtime {

// The numbers of bop2nd_status.
enum class Status { kOk = 0, kIo = 1, kFile = 2, kUnsupported = 3, kArgument = 4, kLimit = 5, kMemory = 6 };

struct Error : std::runtime_error {
  Status status;
  Error(Status status, const std::string& text) : std::runtime_error(text), status(status) {}
};

template <class... Parts>
[[noreturn]] void fail(Status status, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(status, text.str());
}

template <class... Parts>
void require(bool kept, const Parts&... parts) {
  if (!kept) fail(Status::kFile, parts...);
}

}  // namespace bop2nd::runtime
