// SPDX-License-Identifier: Apache-2.0
// Products of a real matrix with a matrix of signs, for gradients: every product is an addition or a
// subtraction, and four of them have just 16 outcomes. These are computed once for 4 rows of the real matrix
// (a table of 16 vectors) and then looked up for all columns of signs: one addition for 4 products, where
// unpacked signs would take 4 multiplications. (The method of the Four Russians; for real matrices see
// BiQGEMM, arXiv 2005.09904.) 32 rows are summed at a time, 8 tables, which stay in the nearest cache.
//
// Every sum has one order, whatever the number of lanes: results are the same bits on all instruction sets.
//
// Include inside a target region and an anonymous namespace within bop2nd.

constexpr int kSumVectors = 2, kTableRows = 4, kTables = kWordBits / kTableRows, kOutcomes = 1 << kTableRows;

// tables[t][outcome][lane] = the sum of rows 4 t + j, j < 4, negative where bit j of the outcome is set.
template <class V>
void make_tables(const float* a, int64_t stride, int n_tables, float* tables) {
  constexpr int kWidth = kSumVectors * V::kLanes;
  for (int t = 0; t < n_tables; ++t, a += kTableRows * stride, tables += kOutcomes * kWidth) {
    for (int lane = 0; lane < kWidth; lane += V::kLanes) {
      typename V::F row[kTableRows], zero = V::setf(0.0f);
#pragma GCC unroll 4
      for (int j = 0; j < kTableRows; ++j) row[j] = V::load(a + j * stride + lane, V::kLanes);
      typename V::F low[4] = {V::add(row[0], row[1]), V::sub(row[1], row[0]), V::sub(row[0], row[1]), zero};
      typename V::F high[4] = {V::add(row[2], row[3]), V::sub(row[3], row[2]), V::sub(row[2], row[3]), zero};
      low[3] = V::sub(zero, low[0]), high[3] = V::sub(zero, high[0]);
#pragma GCC unroll 16
      for (int i = 0; i < kOutcomes; ++i)
        V::store(tables + i * kWidth + lane, V::add(low[i % 4], high[i / 4]), V::kLanes);
    }
  }
}

// Keeps compilers from arithmetic on an index that the processor does as part of an address.
BOP2ND_INLINE uint64_t as_address(uint64_t index) {
  asm("" : "+r"(index));
  return index;
}

// Two sums side by side, of even and of odd tables: an addition takes some cycles. Tables that are left out
// hold zeros, which would change nothing but the sign of a zero.
template <class V, bool kFresh, int kUsed>
void add_outcomes(const float* tables, const uint32_t* signs, int64_t n, float* sums) {
  constexpr int kWidth = kSumVectors * V::kLanes;
  constexpr uint64_t kUnit = sizeof(float) * kWidth / kOutcomes;  // bytes: a table is 256 of them
  for (int64_t i = 0; i < n; ++i, sums += kWidth) {
    // Bytes of 16 outcomes, for even and for odd tables.
    uint32_t word = signs[i], places[2] = {word << 4 & 0xF0F0F0F0u, word & 0xF0F0F0F0u};
    typename V::F sum[2][kSumVectors];
#pragma GCC unroll 8
    for (int t = 0; t < kUsed; ++t) {
      uint64_t place = as_address(places[t % 2] & 0xFFu);
      places[t % 2] = static_cast<uint32_t>(as_address(places[t % 2] >> 8));
      const char* table = reinterpret_cast<const char*>(tables + t * kOutcomes * kWidth);
      const float* outcome = reinterpret_cast<const float*>(table + kUnit * place);
#pragma GCC unroll 2
      for (int v = 0; v < kSumVectors; ++v) {
        typename V::F value = V::load(outcome + v * V::kLanes, V::kLanes);
        sum[t % 2][v] = t < 2 ? value : V::add(sum[t % 2][v], value);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < kSumVectors; ++v) {
      float* to = sums + v * V::kLanes;
      typename V::F total = V::add(sum[0][v], sum[1][v]);
      V::store(to, kFresh ? total : V::add(V::load(to, V::kLanes), total), V::kLanes);
    }
  }
}

template <class V, bool kFresh>
void add_tables(int n_tables, const float* tables, const uint32_t* signs, int64_t n, float* sums) {
  if (n_tables <= 2) return add_outcomes<V, kFresh, 2>(tables, signs, n, sums);
  if (n_tables <= 4) return add_outcomes<V, kFresh, 4>(tables, signs, n, sums);
  add_outcomes<V, kFresh, kTables>(tables, signs, n, sums);
}

template <class V>
void signed_sums(const SignedSums& s) {
  constexpr int kWidth = kSumVectors * V::kLanes;
  alignas(64) float tables[kTables * kOutcomes * kWidth];
  for (int64_t chunk = 0; chunk < s.n_chunks; ++chunk) {
    int n_rows = chunk + 1 == s.n_chunks ? static_cast<int>(s.last_rows) : kWordBits;
    int n_tables = n_rows <= 2 * kTableRows ? 2 : n_rows <= 4 * kTableRows ? 4 : kTables;
    make_tables<V>(s.a + chunk * kWordBits * s.a_stride, s.a_stride, n_tables, tables);
    auto add = s.fresh && chunk == 0 ? add_tables<V, true> : add_tables<V, false>;
    for (int64_t segment = 0; segment < s.n_segments; ++segment)
      add(n_tables, tables, s.signs + chunk * s.chunk_stride + segment * s.segment_stride, s.n,
          s.sums + segment * s.n * kWidth);
  }
}

template <class V>
void transpose_bits(const uint32_t* const* rows, int64_t n_words, uint32_t* to) {
  for (int64_t w = 0; w < n_words; ++w, to += kWordBits) {
    uint32_t words[kWordBits];
    for (int i = 0; i < kWordBits; ++i) words[i] = rows[i][w];
    V::transpose_words(words, to);
  }
}

template <class V>
void transpose(const float* from, int64_t from_stride, int64_t n_rows, int64_t n_columns, float* to,
               int64_t to_stride) {
  for (int64_t row = 0; row < n_rows; row += V::kBlock) {
    for (int64_t column = 0; column < n_columns; column += V::kBlock) {
      const float* block = from + row * from_stride + column;
      float* transposed = to + column * to_stride + row;
      if (row + V::kBlock <= n_rows && column + V::kBlock <= n_columns) {
        V::transpose_block(block, from_stride, transposed, to_stride);
        continue;
      }
      for (int64_t i = 0; i < V::kBlock && row + i < n_rows; ++i) {
        for (int64_t j = 0; j < V::kBlock && column + j < n_columns; ++j)
          transposed[j * to_stride + i] = block[i * from_stride + j];
      }
    }
  }
}

template <class V>
void add_sums(const float* from, int64_t n, float* to, int64_t to_stride) {
  for (int64_t i = 0; i < n; ++i, to += to_stride) {
#pragma GCC unroll 2
    for (int v = 0; v < kSumVectors; ++v, from += V::kLanes) {
      float* line = to + v * V::kLanes;
      V::store(line, V::add(V::load(line, V::kLanes), V::load(from, V::kLanes)), V::kLanes);
    }
  }
}

template <class V, class T>
void load_reals_of(const T* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += V::kLanes) {
    int left = n - i < V::kLanes ? static_cast<int>(n - i) : V::kLanes;
    V::store(to + i, V::load(from + i, left), left);
  }
}

template <class V>
void load_reals(Dtype dtype, const void* from, int64_t n, float* to) {
  if (dtype == Dtype::kFloat32) return load_reals_of<V>(static_cast<const float*>(from), n, to);
  if (dtype == Dtype::kBFloat16) return load_reals_of<V>(static_cast<const BFloat16*>(from), n, to);
  load_reals_of<V>(static_cast<const Float16*>(from), n, to);
}

template <class V, class T>
void store_reals_of(const float* from, int64_t n, const uint32_t* mask, T* to) {
  for (int64_t i = 0; i < n; i += V::kLanes) {
    int left = n - i < V::kLanes ? static_cast<int>(n - i) : V::kLanes;
    typename V::F value = V::load(from + i, left);
    if (mask) value = V::keep(value, V::from_bits(mask[i / kWordBits] >> (i % kWordBits)));
    V::store(to + i, value, left);
  }
}

template <class V>
void store_reals(const float* from, int64_t n, const uint32_t* mask, Dtype dtype, void* to) {
  if (dtype == Dtype::kFloat32) return store_reals_of<V>(from, n, mask, static_cast<float*>(to));
  if (dtype == Dtype::kBFloat16) return store_reals_of<V>(from, n, mask, static_cast<BFloat16*>(to));
  store_reals_of<V>(from, n, mask, static_cast<Float16*>(to));
}
