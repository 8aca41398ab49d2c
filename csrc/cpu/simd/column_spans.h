// Spans: how column kernels traverse a tile. Part of level.h.
//
// Vectors run along the columns: a lane is a channel, and no lane is ever summed with another. A tile is traversed in
// strips of a few rows, in memory order. Accumulators and coefficients stay in the first-level cache, and each is
// loaded once per strip. A row is divided into spans of one vector. The last span ends with the row and may overlap the
// span before it; its first lanes are then repeats and are not counted. A row shorter than a vector is a single span,
// read and written through a padded copy.

struct Span {
  int64_t begin;  // column
  int first;      // lanes [first, last) are not in the span before
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

// Prefetch distance in bytes from a strip: to the next strip, but at least `least`.
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

// Per-column coefficients, as one vector of lanes per span, in the lane order of T.
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

// The epilogue's backward per column.
template <typename T>
struct IdentityBackwards {
  static constexpr bool kReadsX = false;

  BNK_INLINE IdentityBackwards(const ReluBoundVectors&, int64_t) {}
  BNK_INLINE IdentityBackward<T> of_span(int) const { return {}; }
};

template <typename T>
struct ReluBackwards {
  static constexpr bool kReadsX = true;
  const Coefficients<T> low, high;

  BNK_INLINE ReluBackwards(const ReluBoundVectors& bounds, int64_t columns)
      : low(bounds.low, columns), high(bounds.high, columns) {}
  BNK_INLINE ReluBackward<T> of_span(int s) const { return {low.of_span[s], high.of_span[s]}; }
};

// Calls strip.run(span number, span, first row, rows) over the tile, strip by strip. `backwards` reverses the order of
// the strips and of their spans.
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
