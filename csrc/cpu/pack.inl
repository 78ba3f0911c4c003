// SPDX-License-Identifier: Apache-2.0
// Sign bits (and the mask |x| <= 1) of real tensors, and back. Reads every element once: 4 B in, 1/8 or 1/4 B
// out, bound by memory. Two walks: along contiguous rows a comparison yields the bits of a word directly;
// along a strided axis (NCHW packed over channels) each lane is one pixel and collects its own word, so that
// no transposition of bits is needed.
//
// Include inside a target region and an anonymous namespace within bop2nd.

template <class V>
BOP2ND_INLINE uint32_t mask_bits(typename V::F x) {
  return V::bits(V::at_most(V::abs(x), V::setf(1.0f)));
}

template <class V, class T, bool kMask>
void pack_rows_of(const PackShape& s, const T* x, uint32_t* signs, uint32_t* mask, int64_t begin,
                  int64_t end) {
  BitLayout row{s.length};
  int64_t n_words = row.row_words();
  int64_t at = begin * s.n_groups * n_words;
  int64_t outer = begin / (s.n_inner > 0 ? s.n_inner : 1), inner = begin - outer * s.n_inner;
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t g = 0; g < s.n_groups; ++g) {
      const T* p = x + outer * s.outer_stride + inner * s.inner_stride + g * s.group_stride;
      for (int64_t w = 0; w < n_words; ++w, ++at) {
        int n = row.elements_in(w);
        uint32_t sign = 0, inside = 0;
#pragma GCC unroll 4
        for (int i = 0; i < kWordBits; i += V::kLanes) {
          if (n <= i) break;
          typename V::F value = V::load(p + w * kWordBits + i, n - i);
          sign |= V::bits(V::less_zero(value)) << i;
          if constexpr (kMask) inside |= mask_bits<V>(value) << i;
        }
        signs[at] = sign;
        if constexpr (kMask) mask[at] = inside & low_bits(n);
      }
    }
    if (++inner == s.n_inner) inner = 0, ++outer;
  }
}

// Every channel is a stream of its own, more of them than a processor follows by itself: pixels so far ahead
// are asked for, into the second level, which takes more requests at a time than the nearest.
constexpr int kPixelsAhead = 64;

// One tile: up to kLanes neighbouring pixels, all words of all groups.
template <class V, class T, bool kMask>
BOP2ND_INLINE void pack_tile(const PackShape& s, const T* pixel, uint32_t* signs, uint32_t* mask,
                             int n_pixels) {
  BitLayout row{s.length};
  int64_t n_words = row.row_words(), pixel_words = s.n_groups * n_words;
  for (int64_t g = 0; g < s.n_groups; ++g) {
    for (int64_t w = 0; w < n_words; ++w) {
      const T* p = pixel + g * s.group_stride + w * kWordBits * s.length_stride;
      typename V::I sign = V::set1(0), inside = V::set1(0);
      int n = row.elements_in(w);
      for (int i = 0; i < n; ++i, p += s.length_stride) {
        __builtin_prefetch(p + kPixelsAhead, 0, 2);
        typename V::F value = V::load(p, n_pixels);
        typename V::I bit = V::set1(1u << i);
        sign = V::select(V::less_zero(value), V::bit_or(sign, bit), sign);
        if constexpr (kMask) {
          inside = V::select(V::at_most(V::abs(value), V::setf(1.0f)), V::bit_or(inside, bit), inside);
        }
      }
      uint32_t column[2][V::kLanes];
      V::store_int(column[0], sign);
      V::store_int(column[1], inside);
      for (int i = 0; i < n_pixels; ++i) {
        signs[i * pixel_words + g * n_words + w] = column[0][i];
        if constexpr (kMask) mask[i * pixel_words + g * n_words + w] = column[1][i];
      }
    }
  }
}

template <class V, class T, bool kMask>
void pack_columns_of(const PackShape& s, const T* x, uint32_t* signs, uint32_t* mask, int64_t begin,
                     int64_t end) {
  int64_t pixel_words = s.n_groups * words_for(s.length);
  for (int64_t p = begin; p < end;) {
    int64_t outer = p / s.n_inner, inner = p - outer * s.n_inner;
    int64_t left = end - p < s.n_inner - inner ? end - p : s.n_inner - inner;
    int n = left < V::kLanes ? static_cast<int>(left) : V::kLanes;
    pack_tile<V, T, kMask>(s, x + outer * s.outer_stride + inner, signs + p * pixel_words,
                           kMask ? mask + p * pixel_words : nullptr, n);
    p += n;
  }
}

template <class V, class T>
void pack_rows_as(const PackShape& s, const void* x, uint32_t* signs, uint32_t* mask, int64_t begin,
                  int64_t end) {
  const T* typed = static_cast<const T*>(x);
  if (mask) return pack_rows_of<V, T, true>(s, typed, signs, mask, begin, end);
  pack_rows_of<V, T, false>(s, typed, signs, mask, begin, end);
}

template <class V, class T>
void pack_columns_as(const PackShape& s, const void* x, uint32_t* signs, uint32_t* mask, int64_t begin,
                     int64_t end) {
  const T* typed = static_cast<const T*>(x);
  if (mask) return pack_columns_of<V, T, true>(s, typed, signs, mask, begin, end);
  pack_columns_of<V, T, false>(s, typed, signs, mask, begin, end);
}

template <class V>
void pack_rows(const PackShape& s, const void* x, uint32_t* signs, uint32_t* mask, int64_t begin,
               int64_t end) {
  if (s.dtype == Dtype::kFloat32) return pack_rows_as<V, float>(s, x, signs, mask, begin, end);
  if (s.dtype == Dtype::kBFloat16) return pack_rows_as<V, BFloat16>(s, x, signs, mask, begin, end);
  pack_rows_as<V, Float16>(s, x, signs, mask, begin, end);
}

template <class V>
void pack_columns(const PackShape& s, const void* x, uint32_t* signs, uint32_t* mask, int64_t begin,
                  int64_t end) {
  if (s.dtype == Dtype::kFloat32) return pack_columns_as<V, float>(s, x, signs, mask, begin, end);
  if (s.dtype == Dtype::kBFloat16) return pack_columns_as<V, BFloat16>(s, x, signs, mask, begin, end);
  pack_columns_as<V, Float16>(s, x, signs, mask, begin, end);
}

template <class V, class T>
void unpack_rows_as(const uint32_t* words, int64_t length, T* out, int64_t begin, int64_t end) {
  BitLayout row{length};
  int64_t n_words = row.row_words();
  typename V::F one = V::setf(1.0f);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t w = 0; w < n_words; ++w) {
      uint32_t word = words[r * n_words + w];
      int n = row.elements_in(w);
      T* p = out + r * length + w * kWordBits;
#pragma GCC unroll 4
      for (int i = 0; i < kWordBits; i += V::kLanes) {
        if (n <= i) break;
        V::store(p + i, V::flip_sign(one, V::from_bits(word >> i)), n - i);
      }
    }
  }
}

// Rows of a gradient: 0 where the mask bit is 0, as they are elsewhere.
template <class V, class T>
void apply_mask_as(const uint32_t* mask, int64_t length, T* grad, int64_t begin, int64_t end) {
  BitLayout row{length};
  int64_t n_words = row.row_words();
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t w = 0; w < n_words; ++w) {
      uint32_t word = mask[r * n_words + w];
      int n = row.elements_in(w);
      T* p = grad + r * length + w * kWordBits;
#pragma GCC unroll 4
      for (int i = 0; i < kWordBits; i += V::kLanes) {
        if (n <= i) break;
        V::store(p + i, V::keep(V::load(p + i, n - i), V::from_bits(word >> i)), n - i);
      }
    }
  }
}

template <class V>
void apply_mask(const uint32_t* mask, int64_t length, Dtype dtype, void* grad, int64_t begin, int64_t end) {
  if (dtype == Dtype::kFloat32) return apply_mask_as<V>(mask, length, static_cast<float*>(grad), begin, end);
  if (dtype == Dtype::kBFloat16)
    return apply_mask_as<V>(mask, length, static_cast<BFloat16*>(grad), begin, end);
  apply_mask_as<V>(mask, length, static_cast<Float16*>(grad), begin, end);
}

template <class V>
void unpack_rows(const uint32_t* words, int64_t length, Dtype dtype, void* out, int64_t begin, int64_t end) {
  if (dtype == Dtype::kFloat32) return unpack_rows_as<V>(words, length, static_cast<float*>(out), begin, end);
  if (dtype == Dtype::kBFloat16)
    return unpack_rows_as<V>(words, length, static_cast<BFloat16*>(out), begin, end);
  unpack_rows_as<V>(words, length, static_cast<Float16*>(out), begin, end);
}
