// Row kernels: channels-first. kernels.h documents what each computes. Part of level.h.
//
// The channels of a row are contiguous in memory and are traversed in that order, each with its own accumulators or
// coefficients; a single channel is the case channels == 1. A channel's elements in a row are a run, traversed in whole
// vectors. One more vector covers the remainder; it ends with the run and overlaps the vector before it. Sums mask the
// repeated elements; elementwise kernels write them twice, with the same value.

// Runs of at least one vector.
template <typename A, typename Visitor>
BNK_INLINE void visit_run(int64_t length, const Mask<A>& mask, Visitor& visitor) {
  constexpr int64_t kCount = Lanes<A>::kCount;
  int64_t i = 0;
  for (; i + kCount <= length; i += kCount) visitor.whole(i);
  if (i < length) visitor.tail(length - kCount, mask);
}

// ---- forward statistics ----

// Two passes in double, element by element, for runs shorter than a vector and for tiles that overflow float.
template <typename T>
__attribute__((noinline)) Partial exact_welford(const T* x, const Tile& tile) {
  const double count = static_cast<double>(tile.rows * tile.length);
  double sum = 0;
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t i = 0; i < tile.length; ++i) sum += to_double(x[row * tile.stride + i]);
  }
  const double center = sum / count;
  double squares = 0;
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t i = 0; i < tile.length; ++i) {
      const double d = to_double(x[row * tile.stride + i]) - center;
      squares += d * d;
    }
  }
  return {center, squares};
}

template <typename T>
struct Sum {
  using A = Accumulate<T>;
  const T* x;
  Lanes<A> sum;

  BNK_INLINE void whole(int64_t i) { sum = sum + load(x + i); }
  BNK_INLINE void tail(int64_t i, const Mask<A>& mask) { sum = sum + keep(load(x + i), mask); }
};

template <typename T>
struct CenteredSums {
  using A = Accumulate<T>;
  const T* x;
  int64_t ahead;  // bytes
  Lanes<A> center, sum, squares;

  BNK_INLINE void add(const Lanes<A>& d) {
    sum = sum + d;
    squares = squares + d * d;
  }
  BNK_INLINE void whole(int64_t i) {
    prefetch_read(x + i, ahead);  // in the second pass, which reads from the cache while memory would idle
    add(load(x + i) - center);
  }
  BNK_INLINE void tail(int64_t i, const Mask<A>& mask) {
    prefetch_read(x + i, ahead);
    add(keep(load(x + i) - center, mask));
  }
};

// Any center c gives the mean c + S1/n and the sum of squares S2 - S1*S1/n, with S1 and S2 the sums of x - c and (x -
// c)^2. Here c is the rounded mean, so the subtracted term is of the order of the rounding error and nothing cancels.
template <typename T>
void row_welford(const void* data, Tile tile, int64_t ahead, int channels, double floor, Partial* of_tile) {
  using A = Accumulate<T>;
  const T* x = static_cast<const T*>(data);
  if (tile.length < Lanes<A>::kCount) {
    for (int c = 0; c < channels; ++c) of_tile[c] = exact_welford(x + c * tile.length, tile);
    return;
  }
  const double inverse = 1 / static_cast<double>(tile.rows * tile.length);
  const Mask<A> mask = last_elements<T>(tile.length % Lanes<A>::kCount);
  Lanes<A> sum[kMaxRowChannels];
  for (int c = 0; c < channels; ++c) sum[c] = {};
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int c = 0; c < channels; ++c) {
      Sum<T> run{x + row * tile.stride + c * tile.length, sum[c]};
      visit_run<A>(tile.length, mask, run);
      sum[c] = run.sum;
    }
  }
  A center[kMaxRowChannels];
  for (int c = 0; c < channels; ++c) center[c] = static_cast<A>(sum_of_lanes(sum[c]) * inverse);

  Lanes<A> squares[kMaxRowChannels];
  for (int c = 0; c < channels; ++c) sum[c] = squares[c] = {};
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int c = 0; c < channels; ++c) {
      CenteredSums<T> run{x + row * tile.stride + c * tile.length, ahead * static_cast<int64_t>(sizeof(T)),
                          broadcast(center[c]), sum[c], squares[c]};
      visit_run<A>(tile.length, mask, run);
      sum[c] = run.sum;
      squares[c] = run.squares;
    }
  }
  for (int c = 0; c < channels; ++c) {
    const double s1 = sum_of_lanes(sum[c]);
    const double s2 = sum_of_lanes(squares[c]);
    const double shift = s1 * inverse;
    of_tile[c] = {center[c] + shift, not_negative(s2 - s1 * shift)};
    if (!in_range<A>(s2, floor)) of_tile[c] = exact_welford(x + c * tile.length, tile);
  }
}

// ---- backward statistics ----

template <typename T>
__attribute__((noinline)) Partial exact_sums(const T* g, const T* x, const Tile& tile, const SumVectors& vectors,
                                             int64_t channel) {
  using A = Accumulate<T>;
  const double mean = static_cast<const A*>(vectors.mean)[channel];
  const double invstd = static_cast<const A*>(vectors.invstd)[channel];
  const ExactBackward epilogue = ExactBackward::of_channel<A>(vectors.relu_bounds, channel);
  Partial sums{};
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t i = 0; i < tile.length; ++i) {
      const double value = to_double(x[row * tile.stride + i]);
      const double gradient = epilogue(to_double(g[row * tile.stride + i]), value);
      sums.first += gradient;
      sums.second += gradient * ((value - mean) * invstd);
    }
  }
  return sums;
}

template <typename T, typename EpilogueBackward>
struct GradientSums {
  using A = Accumulate<T>;
  const T* g;
  const T* x;
  int64_t ahead;  // bytes
  const EpilogueBackward epilogue;
  Lanes<A> mean, invstd, sum_g, sum_gx;

  BNK_INLINE void add(const Lanes<A>& gradient, const Lanes<A>& value) {
    sum_g = sum_g + gradient;
    sum_gx = sum_gx + gradient * ((value - mean) * invstd);
  }
  BNK_INLINE void whole(int64_t i) {
    prefetch_read(g + i, ahead);
    prefetch_read(x + i, ahead);
    const Lanes<A> value = load(x + i);
    add(epilogue(load(g + i), value), value);
  }
  BNK_INLINE void tail(int64_t i, const Mask<A>& mask) {
    prefetch_read(g + i, ahead);
    prefetch_read(x + i, ahead);
    const Lanes<A> value = load(x + i);
    add(keep(epilogue(load(g + i), value), mask), value);
  }
};

template <typename EpilogueBackward, typename T>
BNK_INLINE void sum_rows(const T* g, const T* x, const Tile& tile, int64_t ahead, int channels,
                         const SumVectors& vectors, Partial* of_tile) {
  using A = Accumulate<T>;
  const A* mean = static_cast<const A*>(vectors.mean);
  const A* invstd = static_cast<const A*>(vectors.invstd);
  const bool runs_are_vectors = tile.length >= Lanes<A>::kCount;
  Lanes<A> sum_g[kMaxRowChannels], sum_gx[kMaxRowChannels];
  for (int c = 0; c < channels; ++c) sum_g[c] = sum_gx[c] = {};
  const Mask<A> mask = last_elements<T>(tile.length % Lanes<A>::kCount);
  for (int64_t row = 0; row < tile.rows && runs_are_vectors; ++row) {
    for (int c = 0; c < channels; ++c) {
      const int64_t offset = row * tile.stride + c * tile.length;
      GradientSums<T, EpilogueBackward> run{g + offset,
                                            x + offset,
                                            ahead * static_cast<int64_t>(sizeof(T)),
                                            EpilogueBackward::of_channel(vectors.relu_bounds, c),
                                            broadcast(mean[c]),
                                            broadcast(invstd[c]),
                                            sum_g[c],
                                            sum_gx[c]};
      visit_run<A>(tile.length, mask, run);
      sum_g[c] = run.sum_g;
      sum_gx[c] = run.sum_gx;
    }
  }
  for (int c = 0; c < channels; ++c) {
    of_tile[c] = {sum_of_lanes(sum_g[c]), sum_of_lanes(sum_gx[c])};
    if (!(runs_are_vectors && in_range<A>(of_tile[c].first) && in_range<A>(of_tile[c].second))) {
      of_tile[c] = exact_sums(g + c * tile.length, x + c * tile.length, tile, vectors, c);
    }
  }
}

template <typename T>
void row_sums(const void* g_data, const void* x_data, Tile tile, int64_t ahead, int channels, const SumVectors& vectors,
              Partial* of_tile) {
  const T* g = static_cast<const T*>(g_data);
  const T* x = static_cast<const T*>(x_data);
  if (vectors.relu_bounds.low != nullptr)
    return sum_rows<ReluBackward<T>>(g, x, tile, ahead, channels, vectors, of_tile);
  sum_rows<IdentityBackward<T>>(g, x, tile, ahead, channels, vectors, of_tile);
}

// ---- elementwise ----

// Writes a visitor's run: with regular stores, or with non-temporal ones between the first and the last multiple of
// kStreamAlignment.
template <Write kWrite, typename T, typename Visitor>
BNK_INLINE void write_run(int64_t length, const T* to, const Visitor& visitor) {
  constexpr int64_t kCount = Lanes<Accumulate<T>>::kCount;
  if (length < kCount) return visitor.part(length);
  int64_t i = 0;
  if constexpr (kWrite == Write::kStreamed) {
    const int64_t beyond = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kStreamAlignment);
    if (beyond != 0) {
      visitor.template whole<Write::kCached>(0);
      i = (kStreamAlignment - beyond) / static_cast<int64_t>(sizeof(T));
    }
  }
  for (; i + kCount <= length; i += kCount) visitor.template whole<kWrite>(i);
  if (i < length) visitor.template whole<Write::kCached>(length - kCount);
}

template <typename T, typename Epilogue>
struct Normalize {
  using A = Accumulate<T>;
  const T* x;
  T* y;
  const Epilogue epilogue;
  Lanes<A> mean, invstd, weight, bias;

  BNK_INLINE Lanes<A> of(const Lanes<A>& value) const { return (value - mean) * invstd * weight + bias; }
  template <Write kWrite>
  BNK_INLINE void whole(int64_t i) const {
    prefetch_read(x + i);
    epilogue.prefetch(i, kReadAhead);
    if constexpr (kWrite == Write::kCached) prefetch_write(y + i);
    store<kWrite>(y + i, epilogue.whole(of(load(x + i)), i));
  }
  BNK_INLINE void part(int64_t count) const {
    store_first(y, epilogue.part(of(load_first(x, count)), 0, count), count);
  }
};

template <Write kWrite, typename T, typename Epilogue>
BNK_INLINE void normalize_rows(const T* x, const Epilogue& epilogue, T* y, const Tile& tile, int channels,
                               const AffineVectors& affine) {
  using A = Accumulate<T>;
  const A* mean = static_cast<const A*>(affine.mean);
  const A* invstd = static_cast<const A*>(affine.invstd);
  const A* weight = static_cast<const A*>(affine.weight);
  const A* bias = static_cast<const A*>(affine.bias);
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int c = 0; c < channels; ++c) {
      const int64_t at = row * tile.stride + c * tile.length;
      const Normalize<T, Epilogue> run{x + at,
                                       y + at,
                                       epilogue.from(at),
                                       broadcast(mean[c]),
                                       broadcast(invstd[c]),
                                       broadcast(weight[c]),
                                       broadcast(bias[c])};
      write_run<kWrite>(tile.length, y + at, run);
    }
  }
}

template <typename T, typename Epilogue>
BNK_INLINE void normalize_rows_with(const T* x, const Epilogue& epilogue, T* y, const Tile& tile, int channels,
                                    const AffineVectors& affine, bool streamed) {
  if (streamed) return normalize_rows<Write::kStreamed>(x, epilogue, y, tile, channels, affine);
  normalize_rows<Write::kCached>(x, epilogue, y, tile, channels, affine);
}

template <typename T>
void row_normalize(const void* x_data, const void* residual_data, void* y_data, Tile tile, int channels,
                   const AffineVectors& affine, bool relu, bool streamed) {
  const T* x = static_cast<const T*>(x_data);
  const T* residual = static_cast<const T*>(residual_data);
  T* y = static_cast<T*>(y_data);
  if (residual != nullptr) {
    return normalize_rows_with(x, ResidualEpilogue<T>(residual, relu), y, tile, channels, affine, streamed);
  }
  if (relu) return normalize_rows_with(x, ReluEpilogue<T>{}, y, tile, channels, affine, streamed);
  normalize_rows_with(x, NoEpilogue<T>{}, y, tile, channels, affine, streamed);
}

template <typename T, typename EpilogueBackward>
struct InputGradient {
  using A = Accumulate<T>;
  const T* g;
  const T* x;
  T* grad_x;
  const EpilogueBackward epilogue;
  Lanes<A> mean, scale, mean_g, slope;

  BNK_INLINE Lanes<A> of(const Lanes<A>& gradient, const Lanes<A>& value) const {
    return scale * (epilogue(gradient, value) - mean_g - (value - mean) * slope);
  }
  template <Write kWrite>
  BNK_INLINE void whole(int64_t i) const {
    if constexpr (kWrite == Write::kCached) prefetch_write(grad_x + i);
    store<kWrite>(grad_x + i, of(load(g + i), load(x + i)));
  }
  BNK_INLINE void part(int64_t count) const {
    store_first(grad_x, of(load_first(g, count), load_first(x, count)), count);
  }
};

template <typename T, typename EpilogueBackward>
struct ScaledGradient {
  using A = Accumulate<T>;
  const T* g;
  const T* x;  // null unless the epilogue reads x
  T* grad_x;
  const EpilogueBackward epilogue;
  Lanes<A> scale;

  template <Write kWrite>
  BNK_INLINE void whole(int64_t i) const {
    prefetch_read(g + i);
    if constexpr (kWrite == Write::kCached) prefetch_write(grad_x + i);
    Lanes<A> gradient = load(g + i);
    if constexpr (EpilogueBackward::kReadsX) {
      prefetch_read(x + i);
      gradient = epilogue(gradient, load(x + i));
    }
    store<kWrite>(grad_x + i, scale * gradient);
  }
  BNK_INLINE void part(int64_t count) const {
    Lanes<A> gradient = load_first(g, count);
    if constexpr (EpilogueBackward::kReadsX) gradient = epilogue(gradient, load_first(x, count));
    store_first(grad_x, scale * gradient, count);
  }
};

template <Write kWrite, typename EpilogueBackward, typename T>
BNK_INLINE void gradient_rows(const T* g, const T* x, T* grad_x, const Tile& tile, int channels,
                              const GradientVectors& gradient) {
  using A = Accumulate<T>;
  const A* mean = static_cast<const A*>(gradient.mean);
  const A* scale = static_cast<const A*>(gradient.scale);
  const A* mean_g = static_cast<const A*>(gradient.mean_g);
  const A* slope = static_cast<const A*>(gradient.slope);
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int c = 0; c < channels; ++c) {
      const int64_t at = row * tile.stride + c * tile.length;
      const EpilogueBackward epilogue = EpilogueBackward::of_channel(gradient.relu_bounds, c);
      if (slope == nullptr) {
        const ScaledGradient<T, EpilogueBackward> run{g + at, EpilogueBackward::kReadsX ? x + at : nullptr, grad_x + at,
                                                      epilogue, broadcast(scale[c])};
        write_run<kWrite>(tile.length, grad_x + at, run);
        continue;
      }
      const InputGradient<T, EpilogueBackward> run{g + at,
                                                   x + at,
                                                   grad_x + at,
                                                   epilogue,
                                                   broadcast(mean[c]),
                                                   broadcast(scale[c]),
                                                   broadcast(mean_g[c]),
                                                   broadcast(slope[c])};
      write_run<kWrite>(tile.length, grad_x + at, run);
    }
  }
}

template <typename EpilogueBackward, typename T>
BNK_INLINE void gradient_rows_with(const T* g, const T* x, T* grad_x, const Tile& tile, int channels,
                                   const GradientVectors& gradient, bool streamed) {
  if (streamed) return gradient_rows<Write::kStreamed, EpilogueBackward>(g, x, grad_x, tile, channels, gradient);
  gradient_rows<Write::kCached, EpilogueBackward>(g, x, grad_x, tile, channels, gradient);
}

template <typename T>
void row_gradient(const void* g_data, const void* x_data, void* grad_x_data, Tile tile, int channels,
                  const GradientVectors& gradient, bool streamed) {
  const T* g = static_cast<const T*>(g_data);
  const T* x = static_cast<const T*>(x_data);
  T* grad_x = static_cast<T*>(grad_x_data);
  if (gradient.relu_bounds.low != nullptr)
    return gradient_rows_with<ReluBackward<T>>(g, x, grad_x, tile, channels, gradient, streamed);
  gradient_rows_with<IdentityBackward<T>>(g, x, grad_x, tile, channels, gradient, streamed);
}
