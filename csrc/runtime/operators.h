// SPDX-License-Identifier: Apache-2.0
// The operators of profile `bits` (docs/packed_file.md, section 6): names of arguments, and who plans them.
#pragma once

#include <string_view>
#include <vector>

namespace bop2nd::runtime {

class Planner;
struct Step;
struct Value;

struct Operator {
  const char* name;
  std::vector<const char*> arguments;  // empty: by position, then `n_positions` of them
  size_t n_positions = 0;
  // Makes the step's value for the sizes at hand, and what computes it.
  Value (*plan)(Planner&, const Step&);
};

// Null for a name that profile `bits` has not.
const Operator* find_operator(std::string_view name);

// One part of the list for each file of them.
const std::vector<Operator>& number_operators();
const std::vector<Operator>& elementwise_operators();
const std::vector<Operator>& shape_operators();
const std::vector<Operator>& window_operators();

}  // namespace bop2nd::runtime
