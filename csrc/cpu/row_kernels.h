// Row kernels: one channel, runs of contiguous elements (kernels.h says what each computes). Part of level.h.
//
// A run is visited in whole vectors; what is left at its end is covered by one more vector that ends with the run and
// overlaps the one before. A sum masks the lanes that were seen; an elementwise result is written twice, with the same value.

template <typename T>
const T* at(const void* data, int64_t element) {
  return static_cast<const T*>(data) + element;
}

template <typename T>
T* at(void* data, int64_t element) {
  return static_cast<T*>(data) + element;
}

// Runs of at least one vector. The first argument of whole() and tail() numbers the accumulator: independent chains.
// Written out, as an accumulator whose number is not a constant would live in memory.
template <typename A, typename Visitor>
BNK_INLINE void visit_run(int64_t length, const Mask<A>& mask, Visitor& visitor) {
  constexpr int64_t kCount = Lanes<A>::kCount;
  int64_t i = 0;
  for (; i + 2 * kCount <= length; i += 2 * kCount) {
    visitor.whole(0, i);
    visitor.whole(1, i + kCount);
  }
  if (i + kCount <= length) {
    visitor.whole(0, i);
    i += kCount;
  }
  if (i < length) visitor.tail(1, length - kCount, mask);
}

template <typename T, typename Visitor>
BNK_INLINE void visit_rows(const Tile& tile, Visitor& visitor) {
  using A = Accumulate<T>;
  const Mask<A> mask = last_elements<T>(tile.length % Lanes<A>::kCount);
  for (int64_t row = 0; row < tile.rows; ++row) {
    visit_run<A>(tile.length, mask, visitor);
    visitor.advance(tile.stride);
  }
}

// ---- forward statistics ----

// Two passes in double, element by element: for runs shorter than a vector and for tiles that overflow float.
template <typename T>
__attribute__((noinline)) void exact_moments(const T* x, const Tile& tile, double* mean, double* squares) {
  const double count = static_cast<double>(tile.rows * tile.length);
  double sum = 0;
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t i = 0; i < tile.length; ++i) sum += to_double(x[row * tile.stride + i]);
  }
  const double center = sum / count;
  double total = 0;
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t i = 0; i < tile.length; ++i) {
      const double d = to_double(x[row * tile.stride + i]) - center;
      total += d * d;
    }
  }
  *mean = center;
  *squares = total;
}

template <typename T>
struct Sum {
  using A = Accumulate<T>;
  const T* x;
  Lanes<A> sum[2] = {};

  BNK_INLINE void whole(int k, int64_t i) { sum[k] = sum[k] + load(x + i); }
  BNK_INLINE void tail(int k, int64_t i, const Mask<A>& mask) { sum[k] = sum[k] + keep(load(x + i), mask); }
  BNK_INLINE void advance(int64_t stride) { x += stride; }
  double total() const { return sum_of_lanes(sum[0] + sum[1]); }
};

template <typename T>
struct CenteredSums {
  using A = Accumulate<T>;
  const T* x;
  Lanes<A> center;
  Lanes<A> sum = {};
  Lanes<A> squares = {};

  BNK_INLINE void add(const Lanes<A>& d) {
    sum = sum + d;
    squares = squares + d * d;
  }
  BNK_INLINE void whole(int, int64_t i) { add(load(x + i) - center); }
  BNK_INLINE void tail(int, int64_t i, const Mask<A>& mask) { add(keep(load(x + i) - center, mask)); }
  BNK_INLINE void advance(int64_t stride) { x += stride; }
};

// Any center c gives the mean c + S1/n and the squares S2 - S1*S1/n; with c the rounded mean the subtracted part is
// within rounding of nothing, so nothing cancels.
template <typename T>
void row_moments(const void* data, Tile tile, double floor, double* mean, double* squares) {
  using A = Accumulate<T>;
  const T* x = static_cast<const T*>(data);
  if (tile.length < Lanes<A>::kCount) return exact_moments(x, tile, mean, squares);
  const double count = static_cast<double>(tile.rows * tile.length);
  Sum<T> first{x};
  visit_rows<T>(tile, first);
  const A center = static_cast<A>(first.total() / count);
  CenteredSums<T> second{x, broadcast(center)};
  visit_rows<T>(tile, second);
  const double s1 = sum_of_lanes(second.sum);
  const double s2 = sum_of_lanes(second.squares);
  if (!in_range<A>(s2, floor)) return exact_moments(x, tile, mean, squares);
  const double shift = s1 / count;
  *mean = center + shift;
  *squares = not_negative(s2 - s1 * shift);
}

// ---- backward statistics ----

template <typename T>
__attribute__((noinline)) void exact_sums(const T* g, const T* x, const Tile& tile, double mean, double invstd,
                                          double* sum_g, double* sum_gx) {
  double first = 0, second = 0;
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t i = 0; i < tile.length; ++i) {
      const double value = to_double(g[row * tile.stride + i]);
      first += value;
      second += value * ((to_double(x[row * tile.stride + i]) - mean) * invstd);
    }
  }
  *sum_g += first;
  *sum_gx += second;
}

template <typename T>
struct GradientSums {
  using A = Accumulate<T>;
  const T* g;
  const T* x;
  Lanes<A> mean, invstd;
  Lanes<A> sum_g = {};
  Lanes<A> sum_gx = {};

  BNK_INLINE void add(const Lanes<A>& gradient, const Lanes<A>& value) {
    sum_g = sum_g + gradient;
    sum_gx = sum_gx + gradient * ((value - mean) * invstd);
  }
  BNK_INLINE void whole(int, int64_t i) { add(load(g + i), load(x + i)); }
  BNK_INLINE void tail(int, int64_t i, const Mask<A>& mask) { add(keep(load(g + i), mask), load(x + i)); }
  BNK_INLINE void advance(int64_t stride) { g += stride, x += stride; }
};

template <typename T>
void row_sums(const void* g, const void* x, Tile tile, double mean, double invstd, double* sum_g, double* sum_gx) {
  using A = Accumulate<T>;
  const T* from_g = static_cast<const T*>(g);
  const T* from_x = static_cast<const T*>(x);
  if (tile.length < Lanes<A>::kCount) return exact_sums(from_g, from_x, tile, mean, invstd, sum_g, sum_gx);
  GradientSums<T> sums{from_g, from_x, broadcast(static_cast<A>(mean)), broadcast(static_cast<A>(invstd))};
  visit_rows<T>(tile, sums);
  const double s1 = sum_of_lanes(sums.sum_g);
  const double s2 = sum_of_lanes(sums.sum_gx);
  if (!(in_range<A>(s1) && in_range<A>(s2))) {
    return exact_sums(from_g, from_x, tile, mean, invstd, sum_g, sum_gx);
  }
  *sum_g += s1;
  *sum_gx += s2;
}

// ---- elementwise ----

// Runs shorter than a vector are the visitor's part().
template <typename T, typename Visitor>
BNK_INLINE void write_rows(const Tile& tile, Visitor& visitor) {
  if (tile.length >= Lanes<Accumulate<T>>::kCount) return visit_rows<T>(tile, visitor);
  for (int64_t row = 0; row < tile.rows; ++row) {
    visitor.part(tile.length);
    visitor.advance(tile.stride);
  }
}

template <typename T>
struct Normalize {
  using A = Accumulate<T>;
  const T* x;
  T* y;
  Lanes<A> mean, invstd, weight, bias;

  BNK_INLINE Lanes<A> of(const Lanes<A>& value) const { return (value - mean) * invstd * weight + bias; }
  BNK_INLINE void whole(int, int64_t i) { store(y + i, of(load(x + i))); }
  BNK_INLINE void tail(int, int64_t i, const Mask<A>&) { store(y + i, of(load(x + i))); }
  BNK_INLINE void part(int64_t count) { store_first(y, of(load_first(x, count)), count); }
  BNK_INLINE void advance(int64_t stride) { x += stride, y += stride; }
};

template <typename T>
void row_normalize(const void* x, void* y, Tile tile, const Affine& affine) {
  using A = Accumulate<T>;
  Normalize<T> normalize{static_cast<const T*>(x),
                         static_cast<T*>(y),
                         broadcast(static_cast<A>(affine.mean)),
                         broadcast(static_cast<A>(affine.invstd)),
                         broadcast(static_cast<A>(affine.weight)),
                         broadcast(static_cast<A>(affine.bias))};
  write_rows<T>(tile, normalize);
}

template <typename T>
struct InputGradient {
  using A = Accumulate<T>;
  const T* g;
  const T* x;
  T* grad_x;
  Lanes<A> mean, invstd, scale, mean_g, mean_gx;

  BNK_INLINE Lanes<A> of(const Lanes<A>& gradient, const Lanes<A>& value) const {
    return scale * (gradient - mean_g - (value - mean) * invstd * mean_gx);
  }
  BNK_INLINE void whole(int, int64_t i) { store(grad_x + i, of(load(g + i), load(x + i))); }
  BNK_INLINE void tail(int, int64_t i, const Mask<A>&) { store(grad_x + i, of(load(g + i), load(x + i))); }
  BNK_INLINE void part(int64_t count) { store_first(grad_x, of(load_first(g, count), load_first(x, count)), count); }
  BNK_INLINE void advance(int64_t stride) { g += stride, x += stride, grad_x += stride; }
};

template <typename T>
struct ScaledGradient {
  using A = Accumulate<T>;
  const T* g;
  T* grad_x;
  Lanes<A> scale;

  BNK_INLINE void whole(int, int64_t i) { store(grad_x + i, scale * load(g + i)); }
  BNK_INLINE void tail(int, int64_t i, const Mask<A>&) { store(grad_x + i, scale * load(g + i)); }
  BNK_INLINE void part(int64_t count) { store_first(grad_x, scale * load_first(g, count), count); }
  BNK_INLINE void advance(int64_t stride) { g += stride, grad_x += stride; }
};

template <typename T>
void row_gradient(const void* g, const void* x, void* grad_x, Tile tile, const Gradient& gradient) {
  using A = Accumulate<T>;
  const Lanes<A> scale = broadcast(static_cast<A>(gradient.scale));
  if (x == nullptr) {
    ScaledGradient<T> scaled{static_cast<const T*>(g), static_cast<T*>(grad_x), scale};
    return write_rows<T>(tile, scaled);
  }
  InputGradient<T> result{static_cast<const T*>(g),
                          static_cast<const T*>(x),
                          static_cast<T*>(grad_x),
                          broadcast(static_cast<A>(gradient.mean)),
                          broadcast(static_cast<A>(gradient.invstd)),
                          scale,
                          broadcast(static_cast<A>(gradient.mean_g)),
                          broadcast(static_cast<A>(gradient.mean_gx))};
  write_rows<T>(tile, result);
}
