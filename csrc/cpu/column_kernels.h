// Column kernels: channels-last (kernels.h says what each computes). Part of level.h.
//
// Vectors run along the columns, so a lane is a channel and no lane is ever summed with another. Memory is walked a
// strip of a few rows at a time, in order; accumulators and coefficients wait in the first-level cache and serve a whole
// strip whenever they are loaded. A row is cut into spans of one vector. The last span ends with the row and may
// overlap the one before: its first lanes are then not new and not counted. A row shorter than a vector is a single span,
// read and written through a padded copy.

constexpr int64_t kSumRows = 8;
constexpr int64_t kMapRows = 4;       // where one tensor is read and another written
constexpr int64_t kGradientRows = 2;  // two tensors are read and a third is written: fewer lines in flight
constexpr int64_t kSumsAhead = 8192;  // bytes; a gradient comes from memory

struct Span {
  int64_t begin;  // column
  int first;      // its lanes [first, last) are new
  int last;
};

template <typename A>
constexpr int kMaxSpans = (kMaxColumns + Lanes<A>::kCount - 1) / Lanes<A>::kCount;

template <typename A>
BNK_INLINE int spans_of(int64_t columns) {
  return static_cast<int>((columns + Lanes<A>::kCount - 1) / Lanes<A>::kCount);
}

template <typename A>
BNK_INLINE Span span_of(int64_t columns, int s) {
  constexpr int64_t kCount = Lanes<A>::kCount;
  if (columns < kCount) return {0, 0, static_cast<int>(columns)};
  const int64_t begin = s * kCount + kCount <= columns ? s * kCount : columns - kCount;
  return {begin, static_cast<int>(s * kCount - begin), static_cast<int>(kCount)};
}

// Bytes from a strip to what is asked for meanwhile: the next one, or as many as make `least` bytes.
template <int64_t kRows, typename T>
BNK_INLINE int64_t strip_ahead(int64_t stride, int64_t least) {
  const int64_t strip = kRows * stride * static_cast<int64_t>(sizeof(T));
  return strip > least ? strip : least;
}

template <bool kWhole, typename T>
BNK_INLINE Lanes<Accumulate<T>> load_span(const T* from, const Span& span) {
  if constexpr (kWhole) return load(from);
  return load_first(from, span.last);
}

template <bool kWhole, Write kWrite, typename T>
BNK_INLINE void store_span(T* to, const Lanes<Accumulate<T>>& value, const Span& span) {
  if constexpr (kWhole) return store<kWrite>(to, value);
  store_first(to, value, span.last);
}

// A vector of coefficients by column, as lanes of T by span.
template <typename T>
struct Coefficients {
  using A = Accumulate<T>;
  Lanes<A> of_span[kMaxSpans<A>];

  BNK_INLINE Coefficients(const void* data, int64_t columns) {
    const A* values = static_cast<const A*>(data);
    for (int s = 0; s < spans_of<A>(columns); ++s) {
      const Span span = span_of<A>(columns, s);
      A padded[Lanes<A>::kCount] = {};
      if (columns < Lanes<A>::kCount) std::memcpy(padded, values, static_cast<size_t>(columns) * sizeof(A));
      of_span[s] = load_like<T>(columns < Lanes<A>::kCount ? padded : values + span.begin);
    }
  }
};

// Calls strip(span number, span, first row, rows) over the tile, strip by strip; backwards, the last span of the last first.
template <typename A, int64_t kRows, typename Strip>
BNK_INLINE void visit_strips(const Tile& tile, Strip& strip, bool backwards = false) {
  const int spans = spans_of<A>(tile.length);
  const int64_t strips = (tile.rows + kRows - 1) / kRows;
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t row = (backwards ? strips - 1 - i : i) * kRows;
    const int64_t rows = tile.rows - row < kRows ? tile.rows - row : kRows;
    if (tile.length < Lanes<A>::kCount) {
      strip.template run<false>(0, span_of<A>(tile.length, 0), row, rows);
      continue;
    }
    for (int j = 0; j < spans; ++j) {
      const int s = backwards ? spans - 1 - j : j;
      strip.template run<true>(s, span_of<A>(tile.length, s), row, rows);
    }
  }
}

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
      read_ahead(from, strip_ahead<kSumRows, T>(stride, kSumsAhead));
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
      read_ahead(from, tile_bytes);  // the next tile, as this one is in the cache already and memory would idle
      const Lanes<A> d = load_span<kWhole>(from, span) - c;
      s1 = s1 + d;
      s2 = s2 + d * d;
    }
    sum[s] = s1;
    squares[s] = s2;
  }
};

// See row_moments for the formula. Every column has the same number of rows, so Chan's merge has the same factors.
template <typename T>
void column_moments(const void* data, Tile tile, double floor, int64_t before, double* mean, double* squares) {
  using A = Accumulate<T>;
  constexpr int kCount = Lanes<A>::kCount;
  const T* x = static_cast<const T*>(data);
  const int spans = spans_of<A>(tile.length);
  const double rows = static_cast<double>(tile.rows);
  const double inverse = 1 / rows;
  const double share = rows / (static_cast<double>(before) + rows);
  const double spread = static_cast<double>(before) * share;

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
        const Partial exact = exact_moments(x + span.begin + j, Tile{tile.rows, 1, tile.stride});
        tile_mean[j] = exact.first;
        tile_squares[j] = exact.second;
      }
    }
    double* to_mean = mean + span.begin;
    double* to_squares = squares + span.begin;
    for (int j = span.first; j < span.last; ++j) {
      const double delta = tile_mean[j] - to_mean[j];
      to_mean[j] += delta * share;
      to_squares[j] += tile_squares[j] + delta * delta * spread;
    }
  }
}

// ---- backward statistics ----

template <typename T>
struct ColumnGradientSums {
  using A = Accumulate<T>;
  const T* g;
  const T* x;
  int64_t stride;
  const Lanes<A>* mean;
  const Lanes<A>* invstd;
  Lanes<A>* sum_g;
  Lanes<A>* sum_gx;

  template <bool kWhole>
  BNK_INLINE void run(int s, const Span& span, int64_t row, int64_t rows) const {
    const Lanes<A> m = mean[s], scale = invstd[s];
    Lanes<A> s1 = sum_g[s], s2 = sum_gx[s];
    const int64_t ahead = strip_ahead<kSumRows, T>(stride, kSumsAhead);
    for (int64_t at = row * stride + span.begin; rows > 0; --rows, at += stride) {
      read_ahead(g + at, ahead);
      read_ahead(x + at, ahead);
      const Lanes<A> gradient = load_span<kWhole>(g + at, span);
      s1 = s1 + gradient;
      s2 = s2 + gradient * ((load_span<kWhole>(x + at, span) - m) * scale);
    }
    sum_g[s] = s1;
    sum_gx[s] = s2;
  }
};

template <typename T>
void column_sums(const void* g_data, const void* x_data, Tile tile, const void* mean, const void* invstd, double* sum_g,
                 double* sum_gx) {
  using A = Accumulate<T>;
  constexpr int kCount = Lanes<A>::kCount;
  const T* g = static_cast<const T*>(g_data);
  const T* x = static_cast<const T*>(x_data);
  const Coefficients<T> means(mean, tile.length);
  const Coefficients<T> invstds(invstd, tile.length);
  const int spans = spans_of<A>(tile.length);
  Lanes<A> of_g[kMaxSpans<A>], of_gx[kMaxSpans<A>];
  for (int s = 0; s < spans; ++s) of_g[s] = of_gx[s] = {};
  const ColumnGradientSums<T> sums{g, x, tile.stride, means.of_span, invstds.of_span, of_g, of_gx};
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
                                         : exact_sums(g + c, x + c, Tile{tile.rows, 1, tile.stride},
                                                      static_cast<const A*>(mean)[c], static_cast<const A*>(invstd)[c]);
      to_g[j] += sums_of_column.first;
      to_gx[j] += sums_of_column.second;
    }
  }
}

// ---- elementwise ----

// Where rows follow each other, memory is read and written from end to end: it may come from beyond the caches.
template <int64_t kRows, typename Strip>
BNK_INLINE void visit_map(const Tile& tile, bool backwards, const Strip& strip) {
  using A = typename Strip::A;
  if (tile.stride == tile.length) return visit_strips<A, 1>(tile, strip, backwards);
  visit_strips<A, kRows>(tile, strip, backwards);
}

// In the direction of the walk.
template <int64_t kRows, typename T>
BNK_INLINE int64_t map_ahead(const Tile& tile, bool backwards) {
  const int64_t ahead = strip_ahead<kRows, T>(tile.stride, kReadAhead);
  return backwards ? -ahead : ahead;
}

// Writes an operation's rows of a span, past the cache if that is asked for and every row's span is aligned.
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

template <typename T>
struct NormalizeSpan {
  using A = Accumulate<T>;
  const T* x;
  int64_t ahead;  // bytes
  const Lanes<A> mean, invstd, weight, bias;

  template <bool kWhole>
  BNK_INLINE Lanes<A> at(int64_t at, const Span& span) const {
    read_ahead(x + at, ahead);
    return (load_span<kWhole>(x + at, span) - mean) * invstd * weight + bias;
  }
};

template <typename T>
struct NormalizeColumns {
  using A = Accumulate<T>;
  const T* x;
  T* y;
  int64_t stride;
  int64_t ahead;  // bytes
  bool streamed;
  const Coefficients<T> mean, invstd, weight, bias;

  template <bool kWhole>
  BNK_INLINE void run(int s, const Span& span, int64_t row, int64_t rows) const {
    const NormalizeSpan<T> normalize{x, ahead, mean.of_span[s], invstd.of_span[s], weight.of_span[s], bias.of_span[s]};
    write_span<kWhole>(streamed, y, row * stride + span.begin, rows, stride, span, normalize);
  }
};

template <typename T>
void column_normalize(const void* x, void* y, Tile tile, const AffineVectors& affine, bool streamed, bool backwards) {
  const NormalizeColumns<T> normalize{static_cast<const T*>(x),
                                      static_cast<T*>(y),
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
struct GradientSpan {
  using A = Accumulate<T>;
  const T* g;
  const T* x;
  int64_t ahead;  // bytes
  const Lanes<A> mean, scale, mean_g, slope;

  template <bool kWhole>
  BNK_INLINE Lanes<A> at(int64_t at, const Span& span) const {
    read_ahead(g + at, ahead);
    read_ahead(x + at, ahead);
    const Lanes<A> projection = (load_span<kWhole>(x + at, span) - mean) * slope;
    return scale * (load_span<kWhole>(g + at, span) - mean_g - projection);
  }
};

template <typename T>
struct GradientColumns {
  using A = Accumulate<T>;
  const T* g;
  const T* x;
  T* grad_x;
  int64_t stride;
  int64_t ahead;  // bytes
  bool streamed;
  const Coefficients<T> mean, scale, mean_g, slope;

  template <bool kWhole>
  BNK_INLINE void run(int s, const Span& span, int64_t row, int64_t rows) const {
    const GradientSpan<T> gradient{g, x, ahead, mean.of_span[s], scale.of_span[s], mean_g.of_span[s], slope.of_span[s]};
    write_span<kWhole>(streamed, grad_x, row * stride + span.begin, rows, stride, span, gradient);
  }
};

template <typename T>
struct ScaledSpan {
  using A = Accumulate<T>;
  const T* g;
  int64_t ahead;  // bytes
  const Lanes<A> scale;

  template <bool kWhole>
  BNK_INLINE Lanes<A> at(int64_t at, const Span& span) const {
    read_ahead(g + at, ahead);
    return scale * load_span<kWhole>(g + at, span);
  }
};

template <typename T>
struct ScaledColumns {
  using A = Accumulate<T>;
  const T* g;
  T* grad_x;
  int64_t stride;
  int64_t ahead;  // bytes
  bool streamed;
  const Coefficients<T> scale;

  template <bool kWhole>
  BNK_INLINE void run(int s, const Span& span, int64_t row, int64_t rows) const {
    write_span<kWhole>(streamed, grad_x, row * stride + span.begin, rows, stride, span,
                       ScaledSpan<T>{g, ahead, scale.of_span[s]});
  }
};

template <typename T>
void column_gradient(const void* g_data, const void* x, void* grad_x_data, Tile tile, const GradientVectors& gradient,
                     bool streamed, bool backwards) {
  const T* g = static_cast<const T*>(g_data);
  T* grad_x = static_cast<T*>(grad_x_data);
  if (x == nullptr) {
    const int64_t ahead = map_ahead<kMapRows, T>(tile, backwards);
    const ScaledColumns<T> scaled{g, grad_x, tile.stride, ahead, streamed, {gradient.scale, tile.length}};
    return visit_map<kMapRows>(tile, backwards, scaled);
  }
  const GradientColumns<T> result{g,
                                  static_cast<const T*>(x),
                                  grad_x,
                                  tile.stride,
                                  map_ahead<kGradientRows, T>(tile, backwards),
                                  streamed,
                                  {gradient.mean, tile.length},
                                  {gradient.scale, tile.length},
                                  {gradient.mean_g, tile.length},
                                  {gradient.slope, tile.length}};
  visit_map<kGradientRows>(tile, backwards, result);
}
