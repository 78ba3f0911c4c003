// SPDX-License-Identifier: Apache-2.0
// Gradients of depthwise convolutions, where each channel has signs of its own: lanes are channels, and there
// is nothing to look up. A channel's word holds its sign as bit 0.
//
// Include inside a target region and an anonymous namespace within bop2nd, after signed_sums.inl.

// Output positions along an axis whose kernel position lies inside the image.
struct Span {
  int64_t first, last;

  Span(const ConvShape& s, int axis, int64_t position) {
    int64_t size = s.in_size(axis), stride = s.stride[axis];
    int64_t at = position * s.dilation[axis] - s.padding[axis];  // of output 0
    first = at >= 0 ? 0 : (-at + stride - 1) / stride;
    last = at >= size ? 0 : (size - 1 - at) / stride + 1;
    if (last > s.out_size(axis)) last = s.out_size(axis);
    if (last < first) last = first;
  }
  bool holds(int64_t position) const { return position >= first && position < last; }
};

// As many numbers, or signs, as a line of sums has lanes; of the last line only n are there.
template <class V, class T>
BOP2ND_INLINE typename V::F line_of(const T* from, int v, int n) {
  return V::load(from + v * V::kLanes, n - v * V::kLanes);
}
template <class V>
BOP2ND_INLINE typename V::F with_signs(typename V::F a, const uint32_t* words, int v, int n) {
  uint32_t there[V::kLanes] = {};
  const uint32_t* from = words + v * V::kLanes;
  if (n < (v + 1) * V::kLanes) {
    for (int i = 0; i < n - v * V::kLanes; ++i) there[i] = from[i];
    from = there;
  }
  typename V::I one = V::set1(1);
  return V::flip_sign(a, V::equal(V::bit_and(V::load_int(from), one), one));
}

// sums[tap][lane] of channels first ... first + n - 1.
template <class V, class T>
void depthwise_weights_of(const ConvShape& s, const T* grad, const uint32_t* x, int64_t first, int n,
                          float* sums) {
  constexpr int kWidth = kSumVectors * V::kLanes;
  int64_t height = s.out_size(0), width = s.out_size(1);
  for (int64_t i = 0; i < s.taps() * kWidth; ++i) sums[i] = 0.0f;
  for (int64_t line = 0; line < s.batch * height; ++line) {
    int64_t image = line / height, row = line % height;
    const T* g = grad + line * width * s.channels + first;
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      int64_t i = tap / s.kernel[1], j = tap % s.kernel[1];
      Span columns(s, 1, j);
      if (!Span(s, 0, i).holds(row)) columns.last = columns.first;
      int64_t y = row * s.stride[0] - s.padding[0] + i * s.dilation[0];
      int64_t pixel = (image * s.height + y) * s.width - s.padding[1] + j * s.dilation[1];
      float* to = sums + tap * kWidth;
      typename V::F sum[kSumVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kSumVectors; ++v) sum[v] = V::load(to + v * V::kLanes, V::kLanes);
      for (int64_t column = columns.first; column < columns.last; ++column) {
#pragma GCC unroll 2
        for (int v = 0; v < kSumVectors; ++v)
          sum[v] =
              V::add(sum[v], with_signs<V>(line_of<V>(g + column * s.channels, v, n),
                                           x + (pixel + column * s.stride[1]) * s.channels + first, v, n));
      }
      for (int64_t column = 0; s.padding_value != 0 && column < width; ++column) {
        if (columns.holds(column)) continue;
        for (int v = 0; v < kSumVectors; ++v) {
          typename V::F value = line_of<V>(g + column * s.channels, v, n);
          sum[v] = s.padding_value > 0 ? V::add(sum[v], value) : V::sub(sum[v], value);
        }
      }
#pragma GCC unroll 2
      for (int v = 0; v < kSumVectors; ++v) V::store(to + v * V::kLanes, sum[v], V::kLanes);
    }
  }
}

// Lines of the input [begin, end) of batch * height; signs[tap][channel]. `seen` is memory for 2 taps.
template <class V, class T>
void depthwise_inputs_of(const ConvShape& s, const T* grad, const uint32_t* signs, const uint32_t* mask,
                         T* to, int64_t* seen, int64_t begin, int64_t end) {
  int64_t out_height = s.out_size(0), out_width = s.out_size(1);
  for (int64_t line = begin; line < end; ++line) {
    int64_t image = line / s.height, y = line % s.height;
    for (int64_t x = 0; x < s.width; ++x) {
      int64_t n_seen = 0;
      for (int64_t tap = 0; tap < s.taps(); ++tap) {
        int64_t row = y + s.padding[0] - tap / s.kernel[1] * s.dilation[0];
        int64_t column = x + s.padding[1] - tap % s.kernel[1] * s.dilation[1];
        if (row < 0 || column < 0 || row % s.stride[0] != 0 || column % s.stride[1] != 0) continue;
        row /= s.stride[0], column /= s.stride[1];
        if (row >= out_height || column >= out_width) continue;
        seen[n_seen++] = ((image * out_height + row) * out_width + column) * s.channels;
        seen[n_seen++] = tap * s.channels;
      }
      int64_t pixel = (line * s.width + x) * s.channels;
      for (int64_t c = 0; c < s.channels; c += V::kLanes) {
        int n = s.channels - c < V::kLanes ? static_cast<int>(s.channels - c) : V::kLanes;
        typename V::F sum = V::setf(0.0f);
        for (int64_t i = 0; i < n_seen; i += 2)
          sum = V::add(sum, with_signs<V>(V::load(grad + seen[i] + c, n), signs + seen[i + 1] + c, 0, n));
        if (mask) {
          uint32_t inside = 0;
          for (int i = 0; i < n; ++i) inside |= (mask[pixel + c + i] & 1u) << i;
          sum = V::keep(sum, V::from_bits(inside));
        }
        V::store(to + pixel + c, sum, n);
      }
    }
  }
}

template <class V>
void depthwise_weights(const ConvShape& s, Dtype dtype, const void* grad, const uint32_t* x, int64_t first,
                       int n, float* sums) {
  if (dtype == Dtype::kFloat32)
    return depthwise_weights_of<V>(s, static_cast<const float*>(grad), x, first, n, sums);
  if (dtype == Dtype::kBFloat16)
    return depthwise_weights_of<V>(s, static_cast<const BFloat16*>(grad), x, first, n, sums);
  depthwise_weights_of<V>(s, static_cast<const Float16*>(grad), x, first, n, sums);
}

template <class V>
void depthwise_inputs(const ConvShape& s, Dtype dtype, const void* grad, const uint32_t* signs,
                      const uint32_t* mask, void* to, int64_t* seen, int64_t begin, int64_t end) {
  if (dtype == Dtype::kFloat32)
    return depthwise_inputs_of<V>(s, static_cast<const float*>(grad), signs, mask, static_cast<float*>(to),
                                  seen, begin, end);
  if (dtype == Dtype::kBFloat16)
    return depthwise_inputs_of<V>(s, static_cast<const BFloat16*>(grad), signs, mask,
                                  static_cast<BFloat16*>(to), seen, begin, end);
  depthwise_inputs_of<V>(s, static_cast<const Float16*>(grad), signs, mask, static_cast<Float16*>(to), seen,
                         begin, end);
}

template <class V>
constexpr SumTable kSumTable = {.lanes = kSumVectors * V::kLanes,
                                .signed_sums = signed_sums<V>,
                                .add_sums = add_sums<V>,
                                .transpose_bits = transpose_bits<V>,
                                .transpose = transpose<V>,
                                .load_reals = load_reals<V>,
                                .store_reals = store_reals<V>};

template <class V>
constexpr TrainingTable kTrainingTable = {.step = step<V>,
                                          .apply_mask = apply_mask<V>,
                                          .depthwise_weights = depthwise_weights<V>,
                                          .depthwise_inputs = depthwise_inputs<V>};
