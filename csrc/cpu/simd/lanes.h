// Lanes<A>: 128 bytes of the arithmetic type A (32 floats or 16 doubles), with its loads, stores and conversions.
//
// level.h includes this file once per SIMD level, inside that level's namespace and compiled for its instruction set. A
// level decides how many native registers hold one Lanes and which instructions convert, but never what is computed.
// Every level has the same lanes and the same accumulators and uses no fused multiply-add, so all levels give the same
// bits.
//
// Lanes of bfloat16 hold the even elements first, then the odd ones: a 32-bit word of memory holds two elements, so a
// shift and a mask widen them without a shuffle. load_like and store_like bring other operands of such lanes (for
// example per-column coefficients) into the same order.
//
// Pointers need only element alignment. A level defines BNK_NATIVE_BYTES (16, 32 or 64) and BNK_X86, BNK_AVX2,
// BNK_AVX512, BNK_AVX512_BF16 (0 or 1).

#define BNK_INLINE inline __attribute__((always_inline))

typedef float NativeFloat __attribute__((vector_size(BNK_NATIVE_BYTES)));
typedef double NativeDouble __attribute__((vector_size(BNK_NATIVE_BYTES)));
typedef int32_t NativeInt32 __attribute__((vector_size(BNK_NATIVE_BYTES)));
typedef int64_t NativeInt64 __attribute__((vector_size(BNK_NATIVE_BYTES)));
typedef uint32_t NativeUint32 __attribute__((vector_size(BNK_NATIVE_BYTES)));

template <typename A>
struct NativeOf;
template <>
struct NativeOf<float> {
  using Vector = NativeFloat;
  using Bits = NativeInt32;
};
template <>
struct NativeOf<double> {
  using Vector = NativeDouble;
  using Bits = NativeInt64;
};

constexpr int kLanesBytes = 128;
constexpr int kParts = kLanesBytes / BNK_NATIVE_BYTES;
constexpr int kHalf = kParts / 2;

template <typename A>
struct Lanes {
  using Native = typename NativeOf<A>::Vector;
  static constexpr int kCount = kLanesBytes / sizeof(A);
  static constexpr int kNativeCount = BNK_NATIVE_BYTES / sizeof(A);
  Native part[kParts];
};

template <typename A>
BNK_INLINE Lanes<A> broadcast(A value) {
  Lanes<A> r;
#pragma GCC unroll 8
  for (int p = 0; p < kParts; ++p) r.part[p] = value - typename Lanes<A>::Native{};
  return r;
}

template <typename A>
BNK_INLINE Lanes<A> operator+(const Lanes<A>& a, const Lanes<A>& b) {
  Lanes<A> r;
#pragma GCC unroll 8
  for (int p = 0; p < kParts; ++p) r.part[p] = a.part[p] + b.part[p];
  return r;
}

template <typename A>
BNK_INLINE Lanes<A> operator-(const Lanes<A>& a, const Lanes<A>& b) {
  Lanes<A> r;
#pragma GCC unroll 8
  for (int p = 0; p < kParts; ++p) r.part[p] = a.part[p] - b.part[p];
  return r;
}

template <typename A>
BNK_INLINE Lanes<A> operator*(const Lanes<A>& a, const Lanes<A>& b) {
  Lanes<A> r;
#pragma GCC unroll 8
  for (int p = 0; p < kParts; ++p) r.part[p] = a.part[p] * b.part[p];
  return r;
}

// ---- masks, for runs that do not end with a whole vector ----

template <typename A>
struct Mask {
  typename NativeOf<A>::Bits part[kParts];
};

// Zeros, then as many ones: a vector loaded from element i has its last i lanes set.
constexpr int kHalfCount32 = kLanesBytes / 2 / 4;
alignas(64) constexpr int32_t kSteps[2 * kHalfCount32] = {
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};

// The mask of the last `remainder` elements of memory, for lanes loaded from T.
template <typename T>
BNK_INLINE Mask<Accumulate<T>> last_elements(int64_t remainder) {
  using A = Accumulate<T>;
  constexpr int64_t kHalfCount = Lanes<A>::kCount / 2;
  constexpr int64_t kWords = sizeof(A) / sizeof(int32_t);
  const bool interleaved = std::is_same<T, BFloat16>::value;
  const int64_t second = interleaved ? (remainder + 1) / 2 : remainder < kHalfCount ? remainder : kHalfCount;
  const int32_t* windows[2] = {kSteps + (remainder - second) * kWords, kSteps + second * kWords};
  Mask<A> mask;
#pragma GCC unroll 8
  for (int p = 0; p < kParts; ++p) {
    std::memcpy(&mask.part[p], windows[p / kHalf] + p % kHalf * (BNK_NATIVE_BYTES / 4), BNK_NATIVE_BYTES);
  }
  return mask;
}

// Zeroes the lanes whose mask is not set, whatever they hold (NaN too).
template <typename A>
BNK_INLINE Lanes<A> keep(const Lanes<A>& a, const Mask<A>& mask) {
  using Native = typename NativeOf<A>::Vector;
  using Bits = typename NativeOf<A>::Bits;
  Lanes<A> r;
#pragma GCC unroll 8
  for (int p = 0; p < kParts; ++p) r.part[p] = (Native)((Bits)a.part[p] & mask.part[p]);
  return r;
}

// The maximum; NaN stays NaN.
template <typename A>
BNK_INLINE Lanes<A> at_least(const Lanes<A>& a, const Lanes<A>& least) {
  Lanes<A> r;
#pragma GCC unroll 8
  for (int p = 0; p < kParts; ++p) r.part[p] = least.part[p] > a.part[p] ? least.part[p] : a.part[p];
  return r;
}

// Zeroes the lanes where x is less than low or greater than high, whatever they hold (NaN too). A NaN in x is neither
// less nor greater.
template <typename A>
BNK_INLINE Lanes<A> keep_within(const Lanes<A>& a, const Lanes<A>& x, const Lanes<A>& low, const Lanes<A>& high) {
  constexpr typename NativeOf<A>::Vector kZero = {};
  Lanes<A> r;
#pragma GCC unroll 8
  for (int p = 0; p < kParts; ++p) {
    const auto outside = (x.part[p] < low.part[p]) | (x.part[p] > high.part[p]);
    r.part[p] = outside ? kZero : a.part[p];
  }
  return r;
}

// ---- memory ----

template <typename A>
BNK_INLINE Lanes<A> load(const A* from) {
  Lanes<A> r;  // register by register: a copy of all 128 bytes would go through memory
#pragma GCC unroll 8
  for (int p = 0; p < kParts; ++p) std::memcpy(&r.part[p], from + p * Lanes<A>::kNativeCount, BNK_NATIVE_BYTES);
  return r;
}

// Regular or non-temporal stores. Non-temporal stores bypass the cache, which saves reading lines that are about to be
// overwritten completely. They need addresses aligned to kStreamAlignment, and end_of_stream() before other threads
// read.
enum class Write { kCached, kStreamed };
constexpr int64_t kStreamAlignment = 64;

template <Write kWrite, typename Register>
BNK_INLINE void put(void* to, Register value) {
#if BNK_X86
  if constexpr (kWrite == Write::kStreamed && sizeof(Register) == 16) {
    return _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)value);
  }
#endif
#if BNK_AVX2
  if constexpr (kWrite == Write::kStreamed && sizeof(Register) == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)value);
  }
#endif
#if BNK_AVX512
  if constexpr (kWrite == Write::kStreamed && sizeof(Register) == 64) {
    return _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)value);
  }
#endif
  std::memcpy(to, &value, sizeof(value));
}

inline void end_of_stream() {
#if BNK_X86
  _mm_sfence();
#endif
}

template <Write kWrite = Write::kCached, typename A>
BNK_INLINE void store(A* to, const Lanes<A>& a) {
#pragma GCC unroll 8
  for (int p = 0; p < kParts; ++p) put<kWrite>(to + p * Lanes<A>::kNativeCount, a.part[p]);
}

BNK_INLINE Lanes<float> load(const BFloat16* from) {
  Lanes<float> r;
#pragma GCC unroll 8
  for (int p = 0; p < kHalf; ++p) {
    NativeUint32 words;
    std::memcpy(&words, from + 2 * p * Lanes<float>::kNativeCount, sizeof(words));
    r.part[p] = (NativeFloat)(words << 16);
    r.part[p + kHalf] = (NativeFloat)(words & 0xffff0000u);
  }
  return r;
}

// Rounds to nearest even into the upper half of each lane; the lower half is unspecified. NaN is not rounded, since the
// carry could turn it into infinity or zero. A NaN that results from arithmetic is already quiet.
BNK_INLINE NativeUint32 round_to_bfloat16(NativeFloat a) {
#if BNK_AVX512
  const __m512i bits = (__m512i)a;
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i half = _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
  const __mmask16 number = _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_ORD_Q);
  return (NativeUint32)_mm512_mask_add_epi32(bits, number, bits, half);
#else
  const NativeUint32 bits = (NativeUint32)a;
  const NativeUint32 half = ((bits >> 16) & 1u) + 0x7fffu;
  return bits + (half & (NativeUint32)(a == a));
#endif
}

BNK_INLINE NativeUint32 pack_bfloat16(NativeFloat even, NativeFloat odd) {
#if BNK_AVX512_BF16
  // The instruction also rounds to nearest even, but treats subnormals as zero; those go through the integer path.
  constexpr int kSubnormal = 0x20;
  const int exceptions =
      _mm512_fpclass_ps_mask((__m512)even, kSubnormal) | _mm512_fpclass_ps_mask((__m512)odd, kSubnormal);
  if (__builtin_expect(exceptions == 0, 1)) {
    alignas(64) static constexpr uint16_t kInTurn[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i even_then_odd = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    return (NativeUint32)_mm512_permutexvar_epi16(_mm512_load_si512(kInTurn), even_then_odd);
  }
#endif
  return (round_to_bfloat16(even) >> 16) | (round_to_bfloat16(odd) & 0xffff0000u);
}

template <Write kWrite = Write::kCached>
BNK_INLINE void store(BFloat16* to, const Lanes<float>& a) {
#pragma GCC unroll 8
  for (int p = 0; p < kHalf; ++p) {
    put<kWrite>(to + 2 * p * Lanes<float>::kNativeCount, pack_bfloat16(a.part[p], a.part[p + kHalf]));
  }
}

#if BNK_AVX512
BNK_INLINE NativeFloat to_opmath(const Float16* from) {
  return (NativeFloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
template <Write kWrite>
BNK_INLINE void from_opmath(Float16* to, NativeFloat a) {
  const __m256i bits = _mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  put<kWrite>(to, bits);
}
#elif BNK_AVX2
BNK_INLINE NativeFloat to_opmath(const Float16* from) {
  return (NativeFloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
template <Write kWrite>
BNK_INLINE void from_opmath(Float16* to, NativeFloat a) {
  const __m128i bits = _mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  put<kWrite>(to, bits);
}
#else
// Not inlined: the bodies are long, and a call costs little in comparison.
inline __attribute__((noinline)) NativeFloat to_opmath(const Float16* from) {
  NativeFloat r;
  for (int i = 0; i < Lanes<float>::kNativeCount; ++i) r[i] = to_float(from[i]);
  return r;
}
template <Write kWrite>
inline __attribute__((noinline)) void from_opmath(Float16* to, NativeFloat a) {
  for (int i = 0; i < Lanes<float>::kNativeCount; ++i) to[i] = to_float16(a[i]);
}
#endif

BNK_INLINE Lanes<float> load(const Float16* from) {
  Lanes<float> r;
#pragma GCC unroll 8
  for (int p = 0; p < kParts; ++p) r.part[p] = to_opmath(from + p * Lanes<float>::kNativeCount);
  return r;
}

template <Write kWrite = Write::kCached>
BNK_INLINE void store(Float16* to, const Lanes<float>& a) {
#pragma GCC unroll 8
  for (int p = 0; p < kParts; ++p) from_opmath<kWrite>(to + p * Lanes<float>::kNativeCount, a.part[p]);
}

// Arithmetic values in memory order, to and from lanes in the order of lanes loaded from T.
template <typename T>
BNK_INLINE Lanes<Accumulate<T>> load_like(const Accumulate<T>* from) {
  if constexpr (!std::is_same<T, BFloat16>::value) {
    return load(from);
  } else {
    constexpr int kCount = Lanes<float>::kCount;
    float ordered[kCount];
    for (int i = 0; i < kCount / 2; ++i) {
      ordered[i] = from[2 * i];
      ordered[i + kCount / 2] = from[2 * i + 1];
    }
    return load(ordered);
  }
}

template <typename T>
BNK_INLINE void store_like(Accumulate<T>* to, const Lanes<Accumulate<T>>& a) {
  if constexpr (!std::is_same<T, BFloat16>::value) {
    store(to, a);
  } else {
    constexpr int kCount = Lanes<float>::kCount;
    float ordered[kCount];
    store(ordered, a);
    for (int i = 0; i < kCount / 2; ++i) {
      to[2 * i] = ordered[i];
      to[2 * i + 1] = ordered[i + kCount / 2];
    }
  }
}

// The first `count` elements of a partial vector; the other lanes are zero.
template <typename T>
BNK_INLINE Lanes<Accumulate<T>> load_first(const T* from, int64_t count) {
  T padded[Lanes<Accumulate<T>>::kCount] = {};
  std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
}

template <typename T>
BNK_INLINE void store_first(T* to, const Lanes<Accumulate<T>>& a, int64_t count) {
  T padded[Lanes<Accumulate<T>>::kCount];
  store(padded, a);
  std::memcpy(to, padded, static_cast<size_t>(count) * sizeof(T));
}

// Sums all lanes as a tree, in double.
template <typename A>
BNK_INLINE double sum_of_lanes(const Lanes<A>& a) {
  constexpr int kCount = Lanes<A>::kCount;
  A lane[kCount];
  store(lane, a);
  double sum[kCount / 2];
  for (int i = 0; i < kCount / 2; ++i)
    sum[i] = static_cast<double>(lane[i]) + static_cast<double>(lane[i + kCount / 2]);
  for (int width = kCount / 4; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  }
  return sum[0];
}

// Prefetching.
//
// Reads prefetch what is read next. For statistics, that is the next tile, whose offset the caller passes. Elementwise
// kernels and other end-to-end traversals prefetch at these fixed distances.
constexpr int64_t kReadAhead = 2048;   // bytes
constexpr int64_t kWriteAhead = 1024;  // bytes

template <typename T>
BNK_INLINE void prefetch_read(const T* here, int64_t bytes = kReadAhead) {
  for (int64_t line = 0; line < static_cast<int64_t>(Lanes<Accumulate<T>>::kCount * sizeof(T)); line += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(here) + bytes + line);
  }
}

template <typename T>
BNK_INLINE void prefetch_write(const T* here) {
  for (int64_t line = 0; line < static_cast<int64_t>(Lanes<Accumulate<T>>::kCount * sizeof(T)); line += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(here) + kWriteAhead + line, 1);
  }
}
