// Column kernels: channels-last. kernels.h documents what each computes, column_spans.h how they traverse a tile. Part
// of level.h.

constexpr int64_t kSumRows = 8;
constexpr int64_t kMapRows = 4;       // one tensor is read and another written
constexpr int64_t kGradientRows = 2;  // two tensors are read and a third is written: fewer cache lines in flight
constexpr int64_t kSumsAhead = 8192;  // bytes; gradients are read from memory

// ---- forward statistics ----

template <typename T>
struct ColumnSum {
  using A = Accumulate<T>;
  const T* x;
  int64_t stride;
  Lanes<A>* sum;

  template <bool kWhole>
  BNK_INLINE void run(int s, const Span& span, int64_t row, int64_t rows) const {
    Lanes<A> total = sum[s];
    for (const T* from = x + row * stride + span.begin; rows > 0; --rows, from += stride) {
      prefetch_read(from, strip_ahead<kSumRows, T>(stride, kSumsAhead));
      total = total + load_span<kWhole>(from, span);
    }
    sum[s] = total;
  }
};

template <typename T>
struct ColumnCenteredSums {
  using A = Accumulate<T>;
  const T* x;
  int64_t stride;
  int64_t tile_bytes;
  const Lanes<A>* center;
  Lanes<A>* sum;
  Lanes<A>* squares;

  template <bool kWhole>
  BNK_INLINE void run(int s, const Span& span, int64_t row, int64_t rows) const {
    const Lanes<A> c = center[s];
    Lanes<A> s1 = sum[s], s2 = squares[s];
    for (const T* from = x + row * stride + span.begin; rows > 0; --rows, from += stride) {
      prefetch_read(from, tile_bytes);  // the next tile: this one is in the cache already, and memory would idle
      const Lanes<A> d = load_span<kWhole>(from, span) - c;
      s1 = s1 + d;
      s2 = s2 + d * d;
    }
    sum[s] = s1;
    squares[s] = s2;
  }
};

// See row_welford for the formula. Every column has the same number of rows, so the factors of Chan's formula are the
// same for all columns.
template <typename T>
void column_welford(const void* data, Tile tile, double floor, int64_t before, double* mean, double* squares) {
  using A = Accumulate<T>;
  constexpr int kCount = Lanes<A>::kCount;
  const T* x = static_cast<const T*>(data);
  const int spans = spans_of<A>(tile.length);
  const double rows = static_cast<double>(tile.rows);
  const double inverse = 1 / rows;
  const double share = rows / (static_cast<double>(before) + rows);
  const double delta_weight = static_cast<double>(before) * share;

  Lanes<A> center[kMaxSpans<A>], sum[kMaxSpans<A>], square[kMaxSpans<A>];
  for (int s = 0; s < spans; ++s) center[s] = {};
  const ColumnSum<T> first{x, tile.stride, center};
  visit_strips<A, kSumRows>(tile, first);
  const Lanes<A> scale = broadcast(static_cast<A>(inverse));
  for (int s = 0; s < spans; ++s) {
    center[s] = center[s] * scale;
    sum[s] = square[s] = {};
  }
  const int64_t tile_bytes = tile.rows * tile.stride * static_cast<int64_t>(sizeof(T));
  const ColumnCenteredSums<T> second{x, tile.stride, tile_bytes, center, sum, square};
  visit_strips<A, kSumRows>(tile, second);

  for (int s = 0; s < spans; ++s) {
    const Span span = span_of<A>(tile.length, s);
    alignas(64) A c[kCount], s1[kCount], s2[kCount];
    store_like<T>(c, center[s]);
    store_like<T>(s1, sum[s]);
    store_like<T>(s2, square[s]);
    alignas(64) double tile_mean[kCount], tile_squares[kCount];
    for (int j = 0; j < kCount; ++j) {
      const double shift = static_cast<double>(s1[j]) * inverse;
      tile_mean[j] = static_cast<double>(c[j]) + shift;
      tile_squares[j] = not_negative(static_cast<double>(s2[j]) - static_cast<double>(s1[j]) * shift);
    }
    if (!all_in_range<kCount>(s2, floor)) {
      for (int j = span.first; j < span.last; ++j) {
        if (in_range<A>(s2[j], floor)) continue;
        const Partial exact = exact_welford(x + span.begin + j, Tile{tile.rows, 1, tile.stride});
        tile_mean[j] = exact.first;
        tile_squares[j] = exact.second;
      }
    }
    double* to_mean = mean + span.begin;
    double* to_squares = squares + span.begin;
    for (int j = span.first; j < span.last; ++j) {
      const double delta = tile_mean[j] - to_mean[j];
      to_mean[j] += delta * share;
      to_squares[j] += tile_squares[j] + delta * delta * delta_weight;
    }
  }
}

// ---- backward statistics ----

template <typename T, typename EpilogueBackwards>
struct ColumnGradientSums {
  using A = Accumulate<T>;
  const T* g;
  const T* x;
  int64_t stride;
  const EpilogueBackwards epilogues;
  const Coefficients<T> mean, invstd;
  Lanes<A>* sum_g;
  Lanes<A>* sum_gx;

  template <bool kWhole>
  BNK_INLINE void run(int s, const Span& span, int64_t row, int64_t rows) const {
    const Lanes<A> m = mean.of_span[s], scale = invstd.of_span[s];
    const auto epilogue = epilogues.of_span(s);
    Lanes<A> s1 = sum_g[s], s2 = sum_gx[s];
    const int64_t ahead = strip_ahead<kSumRows, T>(stride, kSumsAhead);
    for (int64_t at = row * stride + span.begin; rows > 0; --rows, at += stride) {
      prefetch_read(g + at, ahead);
      prefetch_read(x + at, ahead);
      const Lanes<A> value = load_span<kWhole>(x + at, span);
      const Lanes<A> gradient = epilogue(load_span<kWhole>(g + at, span), value);
      s1 = s1 + gradient;
      s2 = s2 + gradient * ((value - m) * scale);
    }
    sum_g[s] = s1;
    sum_gx[s] = s2;
  }
};

template <typename EpilogueBackwards, typename T>
BNK_INLINE void sum_columns(const T* g, const T* x, const Tile& tile, const SumVectors& vectors, double* sum_g,
                            double* sum_gx) {
  using A = Accumulate<T>;
  constexpr int kCount = Lanes<A>::kCount;
  const int spans = spans_of<A>(tile.length);
  Lanes<A> of_g[kMaxSpans<A>], of_gx[kMaxSpans<A>];
  for (int s = 0; s < spans; ++s) of_g[s] = of_gx[s] = {};
  const ColumnGradientSums<T, EpilogueBackwards> sums{g,
                                                      x,
                                                      tile.stride,
                                                      {vectors.relu_bounds, tile.length},
                                                      {vectors.mean, tile.length},
                                                      {vectors.invstd, tile.length},
                                                      of_g,
                                                      of_gx};
  visit_strips<A, kSumRows>(tile, sums);

  for (int s = 0; s < spans; ++s) {
    const Span span = span_of<A>(tile.length, s);
    alignas(64) A s1[kCount], s2[kCount];
    store_like<T>(s1, of_g[s]);
    store_like<T>(s2, of_gx[s]);
    double* to_g = sum_g + span.begin;
    double* to_gx = sum_gx + span.begin;
    if (all_in_range<kCount>(s1) && all_in_range<kCount>(s2)) {
      for (int j = span.first; j < span.last; ++j) to_g[j] += s1[j];
      for (int j = span.first; j < span.last; ++j) to_gx[j] += s2[j];
      continue;
    }
    for (int j = span.first; j < span.last; ++j) {
      const int64_t c = span.begin + j;
      const Partial sums_of_column = in_range<A>(s1[j]) && in_range<A>(s2[j])
                                         ? Partial{s1[j], s2[j]}
                                         : exact_sums(g + c, x + c, Tile{tile.rows, 1, tile.stride}, vectors, c);
      to_g[j] += sums_of_column.first;
      to_gx[j] += sums_of_column.second;
    }
  }
}

template <typename T>
void column_sums(const void* g_data, const void* x_data, Tile tile, const SumVectors& vectors, double* sum_g,
                 double* sum_gx) {
  const T* g = static_cast<const T*>(g_data);
  const T* x = static_cast<const T*>(x_data);
  if (vectors.relu_bounds.low != nullptr) return sum_columns<ReluBackwards<T>>(g, x, tile, vectors, sum_g, sum_gx);
  sum_columns<IdentityBackwards<T>>(g, x, tile, vectors, sum_g, sum_gx);
}

// ---- elementwise ----

// If rows are contiguous, memory is read and written from end to end, since the data may not be in the caches.
template <int64_t kRows, typename Strip>
BNK_INLINE void visit_map(const Tile& tile, bool backwards, const Strip& strip) {
  using A = typename Strip::A;
  if (tile.stride == tile.length) return visit_strips<A, 1>(tile, strip, backwards);
  visit_strips<A, kRows>(tile, strip, backwards);
}

// Prefetch distance, in the direction of the traversal.
template <int64_t kRows, typename T>
BNK_INLINE int64_t map_ahead(const Tile& tile, bool backwards) {
  const int64_t ahead = strip_ahead<kRows, T>(tile.stride, kReadAhead);
  return backwards ? -ahead : ahead;
}

// Writes an operation's rows of a span. Uses non-temporal stores if `streamed` and the span of every row is aligned.
template <bool kWhole, typename T, typename Operation>
BNK_INLINE void write_span(bool streamed, T* to, int64_t at, int64_t rows, int64_t stride, const Span& span,
                           const Operation& operation) {
  const uintptr_t alignment = reinterpret_cast<uintptr_t>(to + at) | static_cast<uintptr_t>(stride) * sizeof(T);
  if (kWhole && streamed && alignment % kStreamAlignment == 0) {
    for (; rows > 0; --rows, at += stride) {
      store_span<kWhole, Write::kStreamed>(to + at, operation.template at<kWhole>(at, span), span);
    }
  } else {
    for (; rows > 0; --rows, at += stride) {
      store_span<kWhole, Write::kCached>(to + at, operation.template at<kWhole>(at, span), span);
    }
  }
}

template <typename T, typename Epilogue>
struct NormalizeSpan {
  using A = Accumulate<T>;
  const T* x;
  const Epilogue epilogue;
  int64_t ahead;  // bytes
  const Lanes<A> mean, invstd, weight, bias;

  template <bool kWhole>
  BNK_INLINE Lanes<A> at(int64_t at, const Span& span) const {
    prefetch_read(x + at, ahead);
    epilogue.prefetch(at, ahead);
    const Lanes<A> value = (load_span<kWhole>(x + at, span) - mean) * invstd * weight + bias;
    if constexpr (kWhole) return epilogue.whole(value, at);
    return epilogue.part(value, at, span.last);
  }
};

template <typename T, typename Epilogue>
struct NormalizeColumns {
  using A = Accumulate<T>;
  const T* x;
  const Epilogue epilogue;
  T* y;
  int64_t stride;
  int64_t ahead;  // bytes
  bool streamed;
  const Coefficients<T> mean, invstd, weight, bias;

  template <bool kWhole>
  BNK_INLINE void run(int s, const Span& span, int64_t row, int64_t rows) const {
    const NormalizeSpan<T, Epilogue> normalize{
        x, epilogue, ahead, mean.of_span[s], invstd.of_span[s], weight.of_span[s], bias.of_span[s]};
    write_span<kWhole>(streamed, y, row * stride + span.begin, rows, stride, span, normalize);
  }
};

template <typename T, typename Epilogue>
BNK_INLINE void normalize_columns_with(const T* x, const Epilogue& epilogue, T* y, const Tile& tile,
                                       const AffineVectors& affine, bool streamed, bool backwards) {
  const NormalizeColumns<T, Epilogue> normalize{x,
                                                epilogue,
                                                y,
                                                tile.stride,
                                                map_ahead<kMapRows, T>(tile, backwards),
                                                streamed,
                                                {affine.mean, tile.length},
                                                {affine.invstd, tile.length},
                                                {affine.weight, tile.length},
                                                {affine.bias, tile.length}};
  visit_map<kMapRows>(tile, backwards, normalize);
}

template <typename T>
void column_normalize(const void* x_data, const void* residual_data, void* y_data, Tile tile,
                      const AffineVectors& affine, bool relu, bool streamed, bool backwards) {
  const T* x = static_cast<const T*>(x_data);
  const T* residual = static_cast<const T*>(residual_data);
  T* y = static_cast<T*>(y_data);
  if (residual != nullptr) {
    return normalize_columns_with(x, ResidualEpilogue<T>(residual, relu), y, tile, affine, streamed, backwards);
  }
  if (relu) return normalize_columns_with(x, ReluEpilogue<T>{}, y, tile, affine, streamed, backwards);
  normalize_columns_with(x, NoEpilogue<T>{}, y, tile, affine, streamed, backwards);
}

template <typename T, typename EpilogueBackward>
struct GradientSpan {
  using A = Accumulate<T>;
  const T* g;
  const T* x;
  const EpilogueBackward epilogue;
  int64_t ahead;  // bytes
  const Lanes<A> mean, scale, mean_g, slope;

  template <bool kWhole>
  BNK_INLINE Lanes<A> at(int64_t at, const Span& span) const {
    prefetch_read(g + at, ahead);
    prefetch_read(x + at, ahead);
    const Lanes<A> value = load_span<kWhole>(x + at, span);
    const Lanes<A> projection = (value - mean) * slope;
    return scale * (epilogue(load_span<kWhole>(g + at, span), value) - mean_g - projection);
  }
};

template <typename T, typename EpilogueBackwards>
struct GradientColumns {
  using A = Accumulate<T>;
  const T* g;
  const T* x;
  T* grad_x;
  const EpilogueBackwards epilogues;
  int64_t stride;
  int64_t ahead;  // bytes
  bool streamed;
  const Coefficients<T> mean, scale, mean_g, slope;

  template <bool kWhole>
  BNK_INLINE void run(int s, const Span& span, int64_t row, int64_t rows) const {
    const auto epilogue = epilogues.of_span(s);
    const GradientSpan<T, decltype(epilogue)> gradient{
        g, x, epilogue, ahead, mean.of_span[s], scale.of_span[s], mean_g.of_span[s], slope.of_span[s]};
    write_span<kWhole>(streamed, grad_x, row * stride + span.begin, rows, stride, span, gradient);
  }
};

template <typename T, typename EpilogueBackward>
struct ScaledSpan {
  using A = Accumulate<T>;
  const T* g;
  const T* x;  // null unless the epilogue reads x
  const EpilogueBackward epilogue;
  int64_t ahead;  // bytes
  const Lanes<A> scale;

  template <bool kWhole>
  BNK_INLINE Lanes<A> at(int64_t at, const Span& span) const {
    prefetch_read(g + at, ahead);
    Lanes<A> gradient = load_span<kWhole>(g + at, span);
    if constexpr (EpilogueBackward::kReadsX) {
      prefetch_read(x + at, ahead);
      gradient = epilogue(gradient, load_span<kWhole>(x + at, span));
    }
    return scale * gradient;
  }
};

template <typename T, typename EpilogueBackwards>
struct ScaledColumns {
  using A = Accumulate<T>;
  const T* g;
  const T* x;  // null unless the epilogues read x
  T* grad_x;
  const EpilogueBackwards epilogues;
  int64_t stride;
  int64_t ahead;  // bytes
  bool streamed;
  const Coefficients<T> scale;

  template <bool kWhole>
  BNK_INLINE void run(int s, const Span& span, int64_t row, int64_t rows) const {
    const auto epilogue = epilogues.of_span(s);
    const ScaledSpan<T, decltype(epilogue)> scaled{g, x, epilogue, ahead, scale.of_span[s]};
    write_span<kWhole>(streamed, grad_x, row * stride + span.begin, rows, stride, span, scaled);
  }
};

template <typename EpilogueBackwards, typename T>
BNK_INLINE void gradient_columns_with(const T* g, const T* x, T* grad_x, const Tile& tile,
                                      const GradientVectors& gradient, bool streamed, bool backwards) {
  if (gradient.slope == nullptr) {
    const int64_t ahead = map_ahead<kMapRows, T>(tile, backwards);
    const ScaledColumns<T, EpilogueBackwards> scaled{g,           x,     grad_x,   {gradient.relu_bounds, tile.length},
                                                     tile.stride, ahead, streamed, {gradient.scale, tile.length}};
    return visit_map<kMapRows>(tile, backwards, scaled);
  }
  const GradientColumns<T, EpilogueBackwards> result{g,
                                                     x,
                                                     grad_x,
                                                     {gradient.relu_bounds, tile.length},
                                                     tile.stride,
                                                     map_ahead<kGradientRows, T>(tile, backwards),
                                                     streamed,
                                                     {gradient.mean, tile.length},
                                                     {gradient.scale, tile.length},
                                                     {gradient.mean_g, tile.length},
                                                     {gradient.slope, tile.length}};
  visit_map<kGradientRows>(tile, backwards, result);
}

template <typename T>
void column_gradient(const void* g_data, const void* x_data, void* grad_x_data, Tile tile,
                     const GradientVectors& gradient, bool streamed, bool backwards) {
  const T* g = static_cast<const T*>(g_data);
  const T* x = static_cast<const T*>(x_data);
  T* grad_x = static_cast<T*>(grad_x_data);
  if (gradient.relu_bounds.low != nullptr) {
    return gradient_columns_with<ReluBackwards<T>>(g, x, grad_x, tile, gradient, streamed, backwards);
  }
  gradient_columns_with<IdentityBackwards<T>>(g, x, grad_x, tile, gradient, streamed, backwards);
}
