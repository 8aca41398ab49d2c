// Column kernels: a column to a channel, a row contiguous (kernels.h says what each computes). Part of level.h.
//
// Vectors run along the columns, so every lane is a channel of its own and no lane is ever summed with another. Columns
// are taken kGroup vectors at a time, for independent chains; the last columns by one vector that ends with the row, of
// which only the new lanes count. Rows shorter than a vector are read and written through a padded copy.

// The columns [begin, begin + width) that one call of a group function handles; its lanes [first, width) are new.
struct Span {
  int64_t begin;
  int width;
  int first;
};

constexpr int kGroup = BNK_AVX512 ? 2 : 1;  // vectors; what the registers hold. The result does not depend on it.

// Calls group<G, kWhole>(span) over all columns.
template <typename A, typename Group>
BNK_INLINE void visit_columns(int64_t columns, Group& group) {
  constexpr int kCount = Lanes<A>::kCount;
  if (columns < kCount) return group.template run<1, false>(Span{0, static_cast<int>(columns), 0});
  int64_t c = 0;
  for (; c + kGroup * kCount <= columns; c += kGroup * kCount) {
    group.template run<kGroup, true>(Span{c, kGroup * kCount, 0});
  }
  for (; c + kCount <= columns; c += kCount) group.template run<1, true>(Span{c, kCount, 0});
  if (c < columns) {
    group.template run<1, true>(Span{columns - kCount, kCount, static_cast<int>(kCount - (columns - c))});
  }
}

template <bool kWhole, typename T>
BNK_INLINE Lanes<Accumulate<T>> load_columns(const T* from, const Span& span, int g) {
  if constexpr (kWhole) return load(from + g * Lanes<Accumulate<T>>::kCount);
  return load_first(from, span.width);
}

// By-column values in the arithmetic type, in the lane order of T.
template <bool kWhole, typename T>
BNK_INLINE Lanes<Accumulate<T>> load_coefficients(const Accumulate<T>* from, const Span& span, int g) {
  using A = Accumulate<T>;
  if constexpr (kWhole) return load_like<T>(from + g * Lanes<A>::kCount);
  A padded[Lanes<A>::kCount] = {};
  std::memcpy(padded, from, static_cast<size_t>(span.width) * sizeof(A));
  return load_like<T>(padded);
}

template <bool kWhole, typename T>
BNK_INLINE void store_columns(T* to, const Lanes<Accumulate<T>>& value, const Span& span, int g) {
  if constexpr (kWhole) return store(to + g * Lanes<Accumulate<T>>::kCount, value);
  store_first(to, value, span.width);
}

// ---- forward statistics ----

template <typename T>
struct ColumnMoments {
  using A = Accumulate<T>;
  const T* x;
  Tile tile;
  double floor;
  double before;
  double* mean;
  double* squares;

  template <int G, bool kWhole>
  BNK_INLINE void run(const Span& span) const {
    constexpr int kWidth = G * Lanes<A>::kCount;
    const T* first = x + span.begin;
    const double rows = static_cast<double>(tile.rows);
    const Lanes<A> inverse = broadcast(static_cast<A>(1 / rows));
    Lanes<A> center[G] = {};
    const T* row = first;
    for (int64_t r = 0; r < tile.rows; ++r, row += tile.stride) {
      for (int g = 0; g < G; ++g) center[g] = center[g] + load_columns<kWhole>(row, span, g);
    }
    for (int g = 0; g < G; ++g) center[g] = center[g] * inverse;
    Lanes<A> sum[G] = {};
    Lanes<A> square[G] = {};
    row = first;
    for (int64_t r = 0; r < tile.rows; ++r, row += tile.stride) {
      for (int g = 0; g < G; ++g) {
        const Lanes<A> d = load_columns<kWhole>(row, span, g) - center[g];
        sum[g] = sum[g] + d;
        square[g] = square[g] + d * d;
      }
    }
    alignas(64) A c[kWidth], s1[kWidth], s2[kWidth];
    for (int g = 0; g < G; ++g) {
      store_like<T>(c + g * Lanes<A>::kCount, center[g]);
      store_like<T>(s1 + g * Lanes<A>::kCount, sum[g]);
      store_like<T>(s2 + g * Lanes<A>::kCount, square[g]);
    }
    alignas(64) double tile_mean[kWidth], tile_squares[kWidth];
    for (int j = 0; j < kWidth; ++j) {
      const double shift = static_cast<double>(s1[j]) / rows;
      tile_mean[j] = static_cast<double>(c[j]) + shift;
      tile_squares[j] = not_negative(static_cast<double>(s2[j]) - static_cast<double>(s1[j]) * shift);
    }
    if (!all_in_range<kWidth>(s2, floor)) {
      for (int j = span.first; j < span.width; ++j) {
        if (!in_range<A>(s2[j], floor)) {
          exact_moments(first + j, Tile{tile.rows, 1, tile.stride}, tile_mean + j, tile_squares + j);
        }
      }
    }
    merge<kWidth>(span, tile_mean, tile_squares);
  }

  // Chan's formula for sets of equal size in every lane.
  template <int kWidth>
  BNK_INLINE void merge(const Span& span, const double* tile_mean, const double* tile_squares) const {
    const double rows = static_cast<double>(tile.rows);
    const double share = rows / (before + rows);
    const double spread = before * share;
    double* to_mean = mean + span.begin;
    double* to_squares = squares + span.begin;
    if (span.first == 0 && span.width == kWidth) {
      for (int j = 0; j < kWidth; ++j) {
        const double delta = tile_mean[j] - to_mean[j];
        to_mean[j] += delta * share;
        to_squares[j] += tile_squares[j] + delta * delta * spread;
      }
    } else {
      for (int j = span.first; j < span.width; ++j) {
        const double delta = tile_mean[j] - to_mean[j];
        to_mean[j] += delta * share;
        to_squares[j] += tile_squares[j] + delta * delta * spread;
      }
    }
  }
};

template <typename T>
void column_moments(const void* x, Tile tile, double floor, int64_t before, double* mean, double* squares) {
  const ColumnMoments<T> moments{static_cast<const T*>(x), tile, floor, static_cast<double>(before), mean, squares};
  visit_columns<Accumulate<T>>(tile.length, moments);
}

// ---- backward statistics ----

template <typename T>
struct ColumnSums {
  using A = Accumulate<T>;
  const T* g;
  const T* x;
  Tile tile;
  const A* mean;
  const A* invstd;
  double* sum_g;
  double* sum_gx;

  template <int G, bool kWhole>
  BNK_INLINE void run(const Span& span) const {
    constexpr int kWidth = G * Lanes<A>::kCount;
    Lanes<A> center[G], scale[G];
    for (int k = 0; k < G; ++k) {
      center[k] = load_coefficients<kWhole, T>(mean + span.begin, span, k);
      scale[k] = load_coefficients<kWhole, T>(invstd + span.begin, span, k);
    }
    Lanes<A> sum[G] = {};
    Lanes<A> product[G] = {};
    const T* row_g = g + span.begin;
    const T* row_x = x + span.begin;
    for (int64_t r = 0; r < tile.rows; ++r, row_g += tile.stride, row_x += tile.stride) {
      for (int k = 0; k < G; ++k) {
        const Lanes<A> gradient = load_columns<kWhole>(row_g, span, k);
        sum[k] = sum[k] + gradient;
        product[k] = product[k] + gradient * ((load_columns<kWhole>(row_x, span, k) - center[k]) * scale[k]);
      }
    }
    alignas(64) A s1[kWidth], s2[kWidth];
    for (int k = 0; k < G; ++k) {
      store_like<T>(s1 + k * Lanes<A>::kCount, sum[k]);
      store_like<T>(s2 + k * Lanes<A>::kCount, product[k]);
    }
    const bool good = all_in_range<kWidth>(s1) && all_in_range<kWidth>(s2);
    double* to_g = sum_g + span.begin;
    double* to_gx = sum_gx + span.begin;
    if (good && span.first == 0 && span.width == kWidth) {
      for (int j = 0; j < kWidth; ++j) to_g[j] += s1[j];
      for (int j = 0; j < kWidth; ++j) to_gx[j] += s2[j];
      return;
    }
    for (int j = span.first; j < span.width; ++j) {
      if (in_range<A>(s1[j]) && in_range<A>(s2[j])) {
        to_g[j] += s1[j];
        to_gx[j] += s2[j];
      } else {
        const int64_t c = span.begin + j;
        exact_sums(g + c, x + c, Tile{tile.rows, 1, tile.stride}, mean[c], invstd[c], to_g + j, to_gx + j);
      }
    }
  }
};

template <typename T>
void column_sums(const void* g, const void* x, Tile tile, const void* mean, const void* invstd, double* sum_g,
                 double* sum_gx) {
  using A = Accumulate<T>;
  const ColumnSums<T> sums{static_cast<const T*>(g),
                           static_cast<const T*>(x),
                           tile,
                           static_cast<const A*>(mean),
                           static_cast<const A*>(invstd),
                           sum_g,
                           sum_gx};
  visit_columns<A>(tile.length, sums);
}

// ---- elementwise ----

// Rows a few at a time: the coefficients of a group of columns stay in registers over them, and memory is still
// walked nearly in order.
constexpr int64_t kRowsAtOnce = 8;

template <typename A, typename Group>
BNK_INLINE void write_columns(const Tile& tile, Group& group) {
  for (int64_t r = 0; r < tile.rows; r += kRowsAtOnce) {
    group.rows = tile.rows - r < kRowsAtOnce ? tile.rows - r : kRowsAtOnce;
    group.offset = r * tile.stride;
    visit_columns<A>(tile.length, group);
  }
}

template <typename T>
struct NormalizeColumns {
  using A = Accumulate<T>;
  const T* x;
  T* y;
  const A *mean, *invstd, *weight, *bias;
  int64_t stride;
  int64_t rows = 0;
  int64_t offset = 0;

  template <int G, bool kWhole>
  BNK_INLINE void run(const Span& span) const {
    const int64_t c = span.begin;
    Lanes<A> m[G], s[G], w[G], b[G];
    for (int g = 0; g < G; ++g) {
      m[g] = load_coefficients<kWhole, T>(mean + c, span, g);
      s[g] = load_coefficients<kWhole, T>(invstd + c, span, g);
      w[g] = load_coefficients<kWhole, T>(weight + c, span, g);
      b[g] = load_coefficients<kWhole, T>(bias + c, span, g);
    }
    const T* from = x + offset + c;
    T* to = y + offset + c;
    for (int64_t r = 0; r < rows; ++r, from += stride, to += stride) {
      for (int g = 0; g < G; ++g) {
        store_columns<kWhole>(to, (load_columns<kWhole>(from, span, g) - m[g]) * s[g] * w[g] + b[g], span, g);
      }
    }
  }
};

template <typename T>
void column_normalize(const void* x, void* y, Tile tile, const AffineVectors& affine) {
  using A = Accumulate<T>;
  NormalizeColumns<T> normalize{static_cast<const T*>(x),
                                static_cast<T*>(y),
                                static_cast<const A*>(affine.mean),
                                static_cast<const A*>(affine.invstd),
                                static_cast<const A*>(affine.weight),
                                static_cast<const A*>(affine.bias),
                                tile.stride};
  write_columns<A>(tile, normalize);
}

template <typename T>
struct InputGradientColumns {
  using A = Accumulate<T>;
  const T* g;
  const T* x;  // nullptr: the inference gradient
  T* grad_x;
  const A *mean, *invstd, *scale, *mean_g, *mean_gx;
  int64_t stride;
  int64_t rows = 0;
  int64_t offset = 0;

  template <int G, bool kWhole>
  BNK_INLINE void run(const Span& span) const {
    const int64_t c = span.begin;
    const T* from_g = g + offset + c;
    T* to = grad_x + offset + c;
    for (int k = 0; k < G; ++k) {  // one vector of columns after another: five coefficients and two streams each
      const Lanes<A> w = load_coefficients<kWhole, T>(scale + c, span, k);
      if (x == nullptr) {
        for (int64_t r = 0; r < rows; ++r) {
          const Lanes<A> gradient = load_columns<kWhole>(from_g + r * stride, span, k);
          store_columns<kWhole>(to + r * stride, w * gradient, span, k);
        }
        continue;
      }
      const Lanes<A> m = load_coefficients<kWhole, T>(mean + c, span, k);
      const Lanes<A> s = load_coefficients<kWhole, T>(invstd + c, span, k);
      const Lanes<A> a = load_coefficients<kWhole, T>(mean_g + c, span, k);
      const Lanes<A> b = load_coefficients<kWhole, T>(mean_gx + c, span, k);
      const T* from_x = x + offset + c;
      for (int64_t r = 0; r < rows; ++r) {
        const Lanes<A> gradient = load_columns<kWhole>(from_g + r * stride, span, k);
        const Lanes<A> value = load_columns<kWhole>(from_x + r * stride, span, k);
        store_columns<kWhole>(to + r * stride, w * (gradient - a - (value - m) * s * b), span, k);
      }
    }
  }
};

template <typename T>
void column_gradient(const void* g, const void* x, void* grad_x, Tile tile, const GradientVectors& gradient) {
  using A = Accumulate<T>;
  InputGradientColumns<T> result{static_cast<const T*>(g),
                                 static_cast<const T*>(x),
                                 static_cast<T*>(grad_x),
                                 static_cast<const A*>(gradient.mean),
                                 static_cast<const A*>(gradient.invstd),
                                 static_cast<const A*>(gradient.scale),
                                 static_cast<const A*>(gradient.mean_g),
                                 static_cast<const A*>(gradient.mean_gx),
                                 tile.stride};
  write_columns<A>(tile, result);
}
