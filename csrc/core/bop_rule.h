// SPDX-License-Identifier: Apache-2.0
// THE UPDATE RULE of Bop and Bop2ndOrder (arXiv 2104.05124, algorithms 1 and 2), on registers only:
//
//   m <- m + gamma * (g - m)            v <- v + sigma * (g * g - v)
//   flip iff  (m < 0) == (w == -1)  and  |m| > a * sqrt(v) + b
//
// Every operation is rounded on its own: compile with -ffp-contract=off (host) or --fmad=false (device).
// Cost per element: 8 floating operations and a square root, with a screen (below) 9 and hardly ever a root.
//
// V is the vocabulary of an instruction set (or of one GPU thread). It names the types F (fp32 lanes), M (one
// truth value per lane, as comparisons leave it) and Set (the same, to count and combine), kScreens, and the
// functions add, sub, mul, sqrt (correctly rounded), abs, less_zero, greater, not_less, bits (M -> Set), same
// (Set == Set), both (Set and Set) and none (of a Set).
#pragma once

#include "bit_layout.h"

namespace bop2nd {

// `screen` is screen_factor(a, b), for vocabularies that screen.
template <class V>
struct Hyper {
  typename V::F gamma, sigma, a, b, screen;
};

template <class V>
struct Verdict {
  typename V::Set candidates, flips;
};

// THE SCREEN: where (|m| * k)^2 < v, rounded as it comes, no weight flips, and the root need not be known.
// k = (1 + 2^-18) / a. Why: the two products and k are off by at most 2^-24 each, so |m| < a sqrt(v) (1 -
// 2^-19); the bound, rounded three times, is at least (a sqrt(v) + b) (1 - 2^-22). Nothing of this
// underflows: sqrt(v) >= 2^-75 where v > 0, so with a >= 2^-50 the product a sqrt(v) is a normal number, and
// |m| k is one wherever it matters; (|m| k)^2 may lose up to 2^-150 below v's last bit, but being less than v
// it is less by 2^-149. Overflow and NaN make the comparison false, which settles nothing. Hyperparameters
// outside of the proof get a NaN: the screen never settles anything, the rule is decided by the root alone.
BOP2ND_HD float screen_factor(float a, float b) {
  bool proven = a >= 0x1p-50f && a <= 0x1p50f && b >= 0.0f;
  return proven ? (1.0f + 0x1p-18f) / a : __builtin_nanf("");
}

// With kSecond == false `v` is neither read nor written, here and below, and the bound is `b` (Bop).
template <class V, bool kSecond>
BOP2ND_HD void update_moments(const Hyper<V>& h, typename V::F g, typename V::F& m, typename V::F& v) {
  m = V::add(m, V::mul(h.gamma, V::sub(g, m)));
  if constexpr (kSecond) v = V::add(v, V::mul(h.sigma, V::sub(V::mul(g, g), v)));
}

// The verdict on weights whose moments are up to date.
template <class V, bool kSecond>
BOP2ND_HD Verdict<V> decide(const Hyper<V>& h, typename V::F m, typename V::F v, typename V::Set negative) {
  Verdict<V> verdict;
  verdict.candidates = V::same(V::bits(V::less_zero(m)), negative);
  typename V::F bound = h.b;
  if constexpr (kSecond) {
    if constexpr (V::kScreens) {
      typename V::F scaled = V::mul(m, h.screen);
      verdict.flips = V::both(verdict.candidates, V::bits(V::not_less(V::mul(scaled, scaled), v)));
      if (__builtin_expect(V::none(verdict.flips), 1)) return verdict;
    }
    bound = V::add(V::mul(h.a, V::sqrt(v)), h.b);
  }
  verdict.flips = V::both(verdict.candidates, V::bits(V::greater(V::abs(m), bound)));
  return verdict;
}

template <class V, bool kSecond>
BOP2ND_HD Verdict<V> bop_rule(const Hyper<V>& h, typename V::F g, typename V::F& m, typename V::F& v,
                              typename V::Set negative) {
  update_moments<V, kSecond>(h, g, m, v);
  return decide<V, kSecond>(h, m, v, negative);
}

}  // namespace bop2nd
