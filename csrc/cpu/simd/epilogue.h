// Epilogue: what follows the normalization, as types. A kernel is compiled for each type and selects one with a single
// branch per tile; the types without an epilogue compile to nothing. Part of level.h.
//
//   forward    y = relu(v + residual), where the residual and the ReLU are optional
//   backward   g; after a ReLU, g where low <= x <= high and 0 elsewhere (../../core/relu_bounds.h)

template <typename T>
struct NoEpilogue {
  using A = Accumulate<T>;

  BNK_INLINE NoEpilogue from(int64_t) const { return {}; }
  BNK_INLINE void prefetch(int64_t, int64_t) const {}
  BNK_INLINE Lanes<A> whole(const Lanes<A>& value, int64_t) const { return value; }
  BNK_INLINE Lanes<A> part(const Lanes<A>& value, int64_t, int64_t) const { return value; }
};

template <typename T>
struct ReluEpilogue : NoEpilogue<T> {
  using A = Accumulate<T>;

  BNK_INLINE ReluEpilogue from(int64_t) const { return {}; }
  BNK_INLINE Lanes<A> whole(const Lanes<A>& value, int64_t) const { return at_least(value, Lanes<A>{}); }
  BNK_INLINE Lanes<A> part(const Lanes<A>& value, int64_t, int64_t) const { return at_least(value, Lanes<A>{}); }
};

// One type with and without a ReLU: the cost of the comparison is hidden by reading the residual from memory.
template <typename T>
struct ResidualEpilogue {
  using A = Accumulate<T>;
  const T* residual;
  Lanes<A> least;

  BNK_INLINE ResidualEpilogue(const T* data, bool relu)
      : residual(data), least(broadcast(relu ? A(0) : -static_cast<A>(__builtin_huge_val()))) {}
  BNK_INLINE ResidualEpilogue from(int64_t element) const {
    ResidualEpilogue moved = *this;
    moved.residual += element;
    return moved;
  }
  BNK_INLINE void prefetch(int64_t at, int64_t bytes) const { prefetch_read(residual + at, bytes); }
  BNK_INLINE Lanes<A> whole(const Lanes<A>& value, int64_t at) const {
    return at_least(value + load(residual + at), least);
  }
  BNK_INLINE Lanes<A> part(const Lanes<A>& value, int64_t at, int64_t count) const {
    return at_least(value + load_first(residual + at, count), least);
  }
};

template <typename T>
struct IdentityBackward {
  using A = Accumulate<T>;
  static constexpr bool kReadsX = false;

  static BNK_INLINE IdentityBackward of_channel(const ReluBoundVectors&, int) { return {}; }
  BNK_INLINE Lanes<A> operator()(const Lanes<A>& g, const Lanes<A>&) const { return g; }
};

template <typename T>
struct ReluBackward {
  using A = Accumulate<T>;
  static constexpr bool kReadsX = true;
  Lanes<A> low, high;

  static BNK_INLINE ReluBackward of_channel(const ReluBoundVectors& bounds, int channel) {
    return {broadcast(static_cast<const A*>(bounds.low)[channel]),
            broadcast(static_cast<const A*>(bounds.high)[channel])};
  }
  BNK_INLINE Lanes<A> operator()(const Lanes<A>& g, const Lanes<A>& x) const { return keep_within(g, x, low, high); }
};

// The backward of one element in double, with or without a ReLU.
struct ExactBackward {
  double low, high;

  template <typename A>
  static BNK_INLINE ExactBackward of_channel(const ReluBoundVectors& bounds, int64_t channel) {
    constexpr double kInfinity = __builtin_huge_val();
    if (bounds.low == nullptr) return {-kInfinity, kInfinity};
    return {static_cast<const A*>(bounds.low)[channel], static_cast<const A*>(bounds.high)[channel]};
  }
  BNK_INLINE double operator()(double g, double x) const { return x < low || x > high ? 0 : g; }
};
