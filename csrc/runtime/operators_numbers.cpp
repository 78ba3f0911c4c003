// SPDX-License-Identifier: Apache-2.0
// Numbers: computed while a plan is made, from sizes.
#include <algorithm>
#include <cmath>

#include "operators.h"
#include "plan.h"

namespace bop2nd::runtime {
namespace {

int64_t whole(const Planner& p, const Step& s, size_t i) { return p.integer(s.arguments[i]); }

double finite(const Planner& p, const Step& s, size_t i) {
  double x = p.number(s.arguments[i]);
  p.check(std::isfinite(x), "a number is not finite");
  return x;
}

Value real_result(const Planner& p, double x) {
  p.check(std::isfinite(x), "a result is not finite");
  return Value::of(x);
}

using IntFunction = bool (*)(int64_t a, int64_t b, int64_t* to);  // false: no 64-bit result
using RealFunction = double (*)(double a, double b);
using Rounding = double (*)(double);

int64_t floor_div(int64_t a, int64_t b) { return a / b - ((a % b != 0) && ((a < 0) != (b < 0))); }

template <IntFunction function, bool two>
Value of_integers(Planner& p, const Step& s) {
  int64_t result = 0;
  int64_t a = whole(p, s, 0), b = two ? whole(p, s, 1) : 0;
  p.check(function(a, b, &result), "a result is no 64-bit integer");
  return Value::of(result);
}

template <RealFunction function, bool two>
Value of_reals(Planner& p, const Step& s) {
  double a = finite(p, s, 0), b = two ? finite(p, s, 1) : 0;
  return real_result(p, function(a, b));
}

template <Rounding rounding>
Value rounded(Planner& p, const Step& s) {
  double x = rounding(finite(p, s, 0));
  p.check(x >= -0x1p63 && x < 0x1p63, "a result is no 64-bit integer");
  return Value::of(static_cast<int64_t>(x));
}

double half_to_even(double x) {
  double down = std::floor(x), rest = x - down;
  if (rest < 0.5 || (rest == 0.5 && std::fmod(down, 2.0) == 0)) return down;
  return down + 1;
}

using Relation = bool (*)(int64_t, int64_t);
template <Relation holds>
Value require_sizes(Planner& p, const Step& s) {
  p.check(holds(whole(p, s, 0), whole(p, s, 1)),
          "an input has a size for which the model takes another way than in the conversion");
  Value yes;
  yes.kind = Value::Kind::kBool, yes.integer = 1;
  return yes;
}

Value get_item(Planner& p, const Step& s) {
  Value values = p.value(s.arguments[0]);
  int64_t index = whole(p, s, 1), n = static_cast<int64_t>(values.items.size());
  if (index < 0) index += n;
  p.check(values.kind == Value::Kind::kList && index >= 0 && index < n, "there is no such item");
  return values.items[static_cast<size_t>(index)];
}

bool add(int64_t a, int64_t b, int64_t* to) { return !__builtin_add_overflow(a, b, to); }
bool sub(int64_t a, int64_t b, int64_t* to) { return !__builtin_sub_overflow(a, b, to); }
bool mul(int64_t a, int64_t b, int64_t* to) { return !__builtin_mul_overflow(a, b, to); }
bool divides(int64_t a, int64_t b) { return b != 0 && !(a == INT64_MIN && b == -1); }
bool floordiv(int64_t a, int64_t b, int64_t* to) { return divides(a, b) && (*to = floor_div(a, b), true); }
bool mod(int64_t a, int64_t b, int64_t* to) {
  return b == -1 ? (*to = 0, true) : divides(a, b) && (*to = a - floor_div(a, b) * b, true);
}
bool neg(int64_t a, int64_t, int64_t* to) { return !__builtin_sub_overflow(int64_t{0}, a, to); }
bool least(int64_t a, int64_t b, int64_t* to) { return *to = std::min(a, b), true; }
bool most(int64_t a, int64_t b, int64_t* to) { return *to = std::max(a, b), true; }
bool magnitude(int64_t a, int64_t, int64_t* to) { return a < 0 ? neg(a, 0, to) : (*to = a, true); }

double real_add(double a, double b) { return a + b; }
double real_sub(double a, double b) { return a - b; }
double real_mul(double a, double b) { return a * b; }
double real_truediv(double a, double b) { return a / b; }
double real_min(double a, double b) { return b < a ? b : a; }
double real_max(double a, double b) { return b > a ? b : a; }
double real_pow(double a, double b) { return std::pow(a, b); }
double real_neg(double a, double) { return -a; }
double real_abs(double a, double) { return std::abs(a); }
double real_sqrt(double a, double) { return std::sqrt(a); }
double real_log(double a, double) { return std::log(a); }
double real_exp(double a, double) { return std::exp(a); }
double real_of(double a, double) { return a; }
bool size_eq(int64_t a, int64_t b) { return a == b; }
bool size_ne(int64_t a, int64_t b) { return a != b; }
bool size_lt(int64_t a, int64_t b) { return a < b; }
bool size_le(int64_t a, int64_t b) { return a <= b; }
bool size_gt(int64_t a, int64_t b) { return a > b; }
bool size_ge(int64_t a, int64_t b) { return a >= b; }

}  // namespace

const std::vector<Operator>& number_operators() {
  static const std::vector<Operator> all = {
      {.name = "getitem", .arguments = {}, .n_positions = 2, .plan = get_item},
      {.name = "int.add", .arguments = {}, .n_positions = 2, .plan = of_integers<add, true>},
      {.name = "int.sub", .arguments = {}, .n_positions = 2, .plan = of_integers<sub, true>},
      {.name = "int.mul", .arguments = {}, .n_positions = 2, .plan = of_integers<mul, true>},
      {.name = "int.floordiv", .arguments = {}, .n_positions = 2, .plan = of_integers<floordiv, true>},
      {.name = "int.mod", .arguments = {}, .n_positions = 2, .plan = of_integers<mod, true>},
      {.name = "int.neg", .arguments = {}, .n_positions = 1, .plan = of_integers<neg, false>},
      {.name = "int.min", .arguments = {}, .n_positions = 2, .plan = of_integers<least, true>},
      {.name = "int.max", .arguments = {}, .n_positions = 2, .plan = of_integers<most, true>},
      {.name = "int.abs", .arguments = {}, .n_positions = 1, .plan = of_integers<magnitude, false>},
      {.name = "int.floor", .arguments = {}, .n_positions = 1, .plan = rounded<std::floor>},
      {.name = "int.ceil", .arguments = {}, .n_positions = 1, .plan = rounded<std::ceil>},
      {.name = "int.trunc", .arguments = {}, .n_positions = 1, .plan = rounded<std::trunc>},
      {.name = "int.round", .arguments = {}, .n_positions = 1, .plan = rounded<half_to_even>},
      {.name = "float.add", .arguments = {}, .n_positions = 2, .plan = of_reals<real_add, true>},
      {.name = "float.sub", .arguments = {}, .n_positions = 2, .plan = of_reals<real_sub, true>},
      {.name = "float.mul", .arguments = {}, .n_positions = 2, .plan = of_reals<real_mul, true>},
      {.name = "float.truediv", .arguments = {}, .n_positions = 2, .plan = of_reals<real_truediv, true>},
      {.name = "float.min", .arguments = {}, .n_positions = 2, .plan = of_reals<real_min, true>},
      {.name = "float.max", .arguments = {}, .n_positions = 2, .plan = of_reals<real_max, true>},
      {.name = "float.pow", .arguments = {}, .n_positions = 2, .plan = of_reals<real_pow, true>},
      {.name = "float.neg", .arguments = {}, .n_positions = 1, .plan = of_reals<real_neg, false>},
      {.name = "float.abs", .arguments = {}, .n_positions = 1, .plan = of_reals<real_abs, false>},
      {.name = "float.sqrt", .arguments = {}, .n_positions = 1, .plan = of_reals<real_sqrt, false>},
      {.name = "float.log", .arguments = {}, .n_positions = 1, .plan = of_reals<real_log, false>},
      {.name = "float.exp", .arguments = {}, .n_positions = 1, .plan = of_reals<real_exp, false>},
      {.name = "float.of", .arguments = {}, .n_positions = 1, .plan = of_reals<real_of, false>},
      {.name = "require.eq", .arguments = {}, .n_positions = 2, .plan = require_sizes<size_eq>},
      {.name = "require.ne", .arguments = {}, .n_positions = 2, .plan = require_sizes<size_ne>},
      {.name = "require.lt", .arguments = {}, .n_positions = 2, .plan = require_sizes<size_lt>},
      {.name = "require.le", .arguments = {}, .n_positions = 2, .plan = require_sizes<size_le>},
      {.name = "require.gt", .arguments = {}, .n_positions = 2, .plan = require_sizes<size_gt>},
      {.name = "require.ge", .arguments = {}, .n_positions = 2, .plan = require_sizes<size_ge>},
  };
  return all;
}

}  // namespace bop2nd::runtime
