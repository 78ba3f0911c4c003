// SPDX-License-Identifier: Apache-2.0
// THE UPDATE RULE of Bop and Bop2ndOrder (arXiv 2104.05124, algorithms 1 and 2), on registers only:
//
//   m <- m + gamma * (g - m)            v <- v + sigma * (g * g - v)
//   flip iff  (m < 0) == (w == -1)  and  |m| > a * sqrt(v) + b
//
// Every operation is rounded on its own: compile with -ffp-contract=off (host) or --fmad=false (device).
// Cost per element: 8 floating operations and a square root; the step around it is bound by memory.
//
// V is the vocabulary of an instruction set (or of one GPU thread). It names the types F (fp32 lanes) and
// M (one truth value per lane) and the functions add, sub, mul, sqrt (correctly rounded), abs, less_zero,
// greater, same (M == M) and both (M and M).
#pragma once

#include "bit_layout.h"

namespace bop2nd {

template <class V>
struct Hyper {
  typename V::F gamma, sigma, a, b;
};

template <class V>
struct Verdict {
  typename V::M candidates, flips;
};

// With kSecond == false `v` is neither read nor written and the bound is `b` (Bop).
template <class V, bool kSecond>
BOP2ND_HD Verdict<V> bop_rule(const Hyper<V>& h, typename V::F g, typename V::F& m, typename V::F& v,
                              typename V::M negative) {
  m = V::add(m, V::mul(h.gamma, V::sub(g, m)));
  typename V::F bound = h.b;
  if constexpr (kSecond) {
    v = V::add(v, V::mul(h.sigma, V::sub(V::mul(g, g), v)));
    bound = V::add(V::mul(h.a, V::sqrt(v)), h.b);
  }
  Verdict<V> verdict;
  verdict.candidates = V::same(V::less_zero(m), negative);
  verdict.flips = V::both(verdict.candidates, V::greater(V::abs(m), bound));
  return verdict;
}

}  // namespace bop2nd
