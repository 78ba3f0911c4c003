// SPDX-License-Identifier: Apache-2.0
// The words that a vocabulary owes to the loops, checked by the compiler: `template struct
// LanesComplete<MyLanes>;` names the first one that is missing. No code comes of it. What a word means stands
// beside it in vocabulary_scalar.h, the plain one.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"

// Vector types in std::declval lose their alignment, of which nothing is asked here.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"

namespace bop2nd {

// Has_<word><V>: whether V has the word, used as `expression`, in which a, b are V::F, i, j V::I, m a V::M,
// n an int, p a uint32_t*, r a float*.
#define BOP2ND_WORD(word, expression)     \
  template <class V, class = void>        \
  struct Has_##word : std::false_type {}; \
  template <class V>                      \
  struct Has_##word<V, std::void_t<decltype(expression)>> : std::true_type {};
#define BOP2ND_OWES(kind, word) \
  static_assert(Has_##word<V>::value, "a vocabulary of " kind " owes `" #word "` (see vocabulary_scalar.h)")

#define BOP2ND_OWES_IF(condition, kind, word)         \
  static_assert(!(condition) || Has_##word<V>::value, \
                "a vocabulary of " kind " owes `" #word "` (see vocabulary_scalar.h)")

#define BOP2ND_A std::declval<typename V::F>()
#define BOP2ND_I std::declval<typename V::I>()
#define BOP2ND_M V::less_zero(BOP2ND_A)
#define BOP2ND_P std::declval<uint32_t*>()
#define BOP2ND_R std::declval<float*>()

// ---- Lanes: one fp32 number (F) or 32-bit integer (I) a lane, comparisons as masks (M) or bits (Set).
BOP2ND_WORD(setf, V::setf(1.0f))
BOP2ND_WORD(add, V::add(BOP2ND_A, BOP2ND_A))
BOP2ND_WORD(sub, V::sub(BOP2ND_A, BOP2ND_A))
BOP2ND_WORD(mul, V::mul(BOP2ND_A, BOP2ND_A))
BOP2ND_WORD(fma, V::fma(BOP2ND_A, BOP2ND_A, BOP2ND_A))
BOP2ND_WORD(sqrt, V::sqrt(BOP2ND_A))
BOP2ND_WORD(abs, V::abs(BOP2ND_A))
BOP2ND_WORD(less_zero, V::less_zero(BOP2ND_A))
BOP2ND_WORD(greater, V::greater(BOP2ND_A, BOP2ND_A))
BOP2ND_WORD(at_most, V::at_most(BOP2ND_A, BOP2ND_A))
BOP2ND_WORD(not_less, V::not_less(BOP2ND_A, BOP2ND_A))
BOP2ND_WORD(flip_sign, V::flip_sign(BOP2ND_A, BOP2ND_M))
BOP2ND_WORD(keep, V::keep(BOP2ND_A, BOP2ND_M))
BOP2ND_WORD(bits, V::bits(BOP2ND_M))
BOP2ND_WORD(from_bits, V::from_bits(1u))
BOP2ND_WORD(set1, V::set1(1u))
BOP2ND_WORD(iota, V::iota())
BOP2ND_WORD(load_int, V::load_int(BOP2ND_P))
BOP2ND_WORD(store_int, V::store_int(BOP2ND_P, BOP2ND_I))
BOP2ND_WORD(add_int, V::add_int(BOP2ND_I, BOP2ND_I))
BOP2ND_WORD(mul_int, V::mul_int(BOP2ND_I, BOP2ND_I))
BOP2ND_WORD(bit_xor, V::bit_xor(BOP2ND_I, BOP2ND_I))
BOP2ND_WORD(bit_and, V::bit_and(BOP2ND_I, BOP2ND_I))
BOP2ND_WORD(bit_or, V::bit_or(BOP2ND_I, BOP2ND_I))
BOP2ND_WORD(shift_right, V::template shift_right<3>(BOP2ND_I))
BOP2ND_WORD(equal, V::equal(BOP2ND_I, BOP2ND_I))
BOP2ND_WORD(select, V::select(BOP2ND_M, BOP2ND_I, BOP2ND_I))
BOP2ND_WORD(as_int, V::as_int(BOP2ND_A))
BOP2ND_WORD(as_float, V::as_float(BOP2ND_I))
BOP2ND_WORD(look_up, V::look_up(BOP2ND_P, BOP2ND_I))
BOP2ND_WORD(load, (V::load(std::declval<const float*>(), 1), V::load(std::declval<const BFloat16*>(), 1),
                   V::load(std::declval<const Float16*>(), 1)))
BOP2ND_WORD(store, (V::store(BOP2ND_R, BOP2ND_A, 1), V::store(std::declval<BFloat16*>(), BOP2ND_A, 1),
                    V::store(std::declval<Float16*>(), BOP2ND_A, 1)))
BOP2ND_WORD(store_low16, V::store_low16(std::declval<BFloat16*>(), BOP2ND_I, 1))
BOP2ND_WORD(transpose_words, V::transpose_words(std::declval<const uint32_t*>(), BOP2ND_P))
BOP2ND_WORD(transpose_block, V::transpose_block(BOP2ND_R, 1, BOP2ND_R, 1))

template <class V>
struct LanesComplete {
  static_assert(V::kLanes * sizeof(float) == sizeof(typename V::F), "kLanes is the number of floats in an F");
  static_assert(V::kBlock > 0, "transpose_block works on kBlock rows and columns");
  static_assert(V::kPairs || !V::kPairs, "kPairs: whether step_pairs.inl serves (load_pairs and others)");
  BOP2ND_OWES("lanes", setf);
  BOP2ND_OWES("lanes", add);
  BOP2ND_OWES("lanes", sub);
  BOP2ND_OWES("lanes", mul);
  BOP2ND_OWES("lanes", fma);
  BOP2ND_OWES("lanes", sqrt);
  BOP2ND_OWES("lanes", abs);
  BOP2ND_OWES("lanes", less_zero);
  BOP2ND_OWES("lanes", greater);
  BOP2ND_OWES("lanes", at_most);
  BOP2ND_OWES("lanes", not_less);
  BOP2ND_OWES("lanes", flip_sign);
  BOP2ND_OWES("lanes", keep);
  BOP2ND_OWES("lanes", bits);
  BOP2ND_OWES("lanes", from_bits);
  BOP2ND_OWES("lanes", set1);
  BOP2ND_OWES("lanes", iota);
  BOP2ND_OWES("lanes", load_int);
  BOP2ND_OWES("lanes", store_int);
  BOP2ND_OWES("lanes", add_int);
  BOP2ND_OWES("lanes", mul_int);
  BOP2ND_OWES("lanes", bit_xor);
  BOP2ND_OWES("lanes", bit_and);
  BOP2ND_OWES("lanes", bit_or);
  BOP2ND_OWES("lanes", shift_right);
  BOP2ND_OWES("lanes", equal);
  BOP2ND_OWES("lanes", select);
  BOP2ND_OWES("lanes", as_int);
  BOP2ND_OWES("lanes", as_float);
  BOP2ND_OWES("lanes", look_up);
  BOP2ND_OWES("lanes", load);
  BOP2ND_OWES("lanes", store);
  BOP2ND_OWES("lanes", store_low16);
  BOP2ND_OWES("lanes", transpose_words);
  BOP2ND_OWES("lanes", transpose_block);
};

// ---- Counting: words of weights (I) against a word of an activation, counts of bits by carry-save adding.
BOP2ND_WORD(count_load, V::load(std::declval<const uint32_t*>()))
BOP2ND_WORD(xor_word, V::xor_word(BOP2ND_I, std::declval<const uint32_t*>()))
BOP2ND_WORD(full_add,
            V::full_add(std::declval<typename V::I&>(), BOP2ND_I, BOP2ND_I, std::declval<typename V::I&>()))
BOP2ND_WORD(pair_add, V::pair_add(std::declval<typename V::I&>(), BOP2ND_I, BOP2ND_I,
                                  std::declval<const uint32_t*>(), std::declval<typename V::I&>()))
BOP2ND_WORD(byte_counts, V::template byte_counts<1>(BOP2ND_I))
BOP2ND_WORD(add_bytes, V::add_bytes(BOP2ND_I, BOP2ND_I))
BOP2ND_WORD(add_counts, V::add(BOP2ND_I, BOP2ND_I))
BOP2ND_WORD(sum_lanes, V::template sum_lanes<8>(BOP2ND_I, BOP2ND_I, std::declval<typename V::I (&)[4]>()))
BOP2ND_WORD(spread, V::template spread<8>(std::declval<const uint32_t*>(), 1))
BOP2ND_WORD(make_pairs, V::make_pairs(BOP2ND_I))
BOP2ND_WORD(dot, V::dot(BOP2ND_I, BOP2ND_I))
BOP2ND_WORD(real, V::real(BOP2ND_I))
BOP2ND_WORD(less, V::less(BOP2ND_I, std::declval<const int32_t*>(), 1))
// For count_bytes.inl instead of adders, popcounts and sums of planes.
#define BOP2ND_B V::popcounts(BOP2ND_I)
BOP2ND_WORD(popcounts, V::popcounts(BOP2ND_I))
BOP2ND_WORD(no_bytes, V::no_bytes())
BOP2ND_WORD(add_popcounts, V::add_bytes(BOP2ND_B, BOP2ND_B))
BOP2ND_WORD(add_to, V::add_to(std::declval<typename V::template Wide<8>&>(), BOP2ND_B))
BOP2ND_WORD(twice, V::twice(std::declval<typename V::template Wide<8>&>()))
BOP2ND_WORD(widen, V::widen(std::declval<const typename V::template Wide<8>&>(),
                            std::declval<typename V::I (&)[4]>()))
BOP2ND_WORD(keep_in_register, V::keep_in_register(std::declval<typename V::I&>()))

template <class V>
struct CountComplete {
  static_assert(V::kLanes * sizeof(uint32_t) == sizeof(typename V::I),
                "kLanes is the number of words in an I");
  static_assert(V::kPixels > 0, "kPixels: pixels that are counted at a time, as many as registers hold");
  static_assert(V::kCountsBytes || !V::kCountsBytes, "kCountsBytes: whether count_bytes.inl serves");
  static_assert(V::Lanes::kLanes > 0, "Lanes: the vocabulary of the epilogue");
  BOP2ND_OWES("counting", count_load);
  BOP2ND_OWES("counting", store_int);
  BOP2ND_OWES("counting", set1);
  BOP2ND_OWES("counting", bit_xor);
  BOP2ND_OWES("counting", xor_word);
  BOP2ND_OWES_IF(!V::kCountsBytes, "counting", full_add);
  BOP2ND_OWES("counting", pair_add);
  BOP2ND_OWES_IF(!V::kCountsBytes, "counting", byte_counts);
  BOP2ND_OWES_IF(!V::kCountsBytes, "counting", add_bytes);
  BOP2ND_OWES("counting", add_counts);
  BOP2ND_OWES_IF(!V::kCountsBytes, "counting", sum_lanes);
  BOP2ND_OWES("counting", spread);
  BOP2ND_OWES("counting", make_pairs);
  BOP2ND_OWES("counting", dot);
  BOP2ND_OWES("counting", real);
  BOP2ND_OWES("counting", less);
  BOP2ND_OWES("counting", keep_in_register);
  BOP2ND_OWES_IF(V::kCountsBytes, "counting", popcounts);
  BOP2ND_OWES_IF(V::kCountsBytes, "counting", no_bytes);
  BOP2ND_OWES_IF(V::kCountsBytes, "counting", add_popcounts);
  BOP2ND_OWES_IF(V::kCountsBytes, "counting", add_to);
  BOP2ND_OWES_IF(V::kCountsBytes, "counting", twice);
  BOP2ND_OWES_IF(V::kCountsBytes, "counting", widen);
};

// ---- Bytes: four unsigned bytes of x in every lane times four signs. A vocabulary's signs may have any form
// that its own add_products reads, in 4 bytes a lane; its sums, before they are whole, any width.
BOP2ND_WORD(spread_signs, V::template spread_signs<3>(BOP2ND_I))
BOP2ND_WORD(add_products, V::add_products(std::declval<typename V::I&>(), BOP2ND_I, BOP2ND_I))
BOP2ND_WORD(whole, V::whole(BOP2ND_I))

template <class V>
struct BytesComplete {
  static_assert(V::kRows > 0 && V::kSteps >= 64, "kRows: rows at a time; kSteps: before sums are made whole");
  BOP2ND_OWES("bytes", spread_signs);
  BOP2ND_OWES("bytes", add_products);
  BOP2ND_OWES("bytes", whole);
};

#undef BOP2ND_B
#undef BOP2ND_WORD
#undef BOP2ND_OWES
#undef BOP2ND_OWES_IF
#undef BOP2ND_A
#undef BOP2ND_I
#undef BOP2ND_M
#undef BOP2ND_P
#undef BOP2ND_R

}  // namespace bop2nd

#pragma GCC diagnostic pop
