// Lanes<A>: 64 bytes of arithmetic type A (16 floats or 8 doubles), and the loads and stores between it and memory.
//
// Included by level.h once for each SIMD level, inside that level's namespace and compiled for it. A level decides how
// many native registers hold one Lanes and which instructions convert; it never decides what is computed. Every level
// has the same lanes, the same accumulators and no fused multiply-add, so every level gives the same bits.
//
// Memory may be aligned to its element only. Level: BNK_NATIVE_BYTES (16, 32 or 64), BNK_AVX2, BNK_AVX512 (0 or 1).

#define BNK_INLINE inline __attribute__((always_inline))

typedef float NativeFloat __attribute__((vector_size(BNK_NATIVE_BYTES)));
typedef double NativeDouble __attribute__((vector_size(BNK_NATIVE_BYTES)));
typedef int32_t NativeInt32 __attribute__((vector_size(BNK_NATIVE_BYTES)));
typedef int64_t NativeInt64 __attribute__((vector_size(BNK_NATIVE_BYTES)));

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

constexpr int kParts = 64 / BNK_NATIVE_BYTES;

template <typename A>
struct Lanes {
  using Native = typename NativeOf<A>::Vector;
  static constexpr int kCount = 64 / sizeof(A);
  static constexpr int kNativeCount = BNK_NATIVE_BYTES / sizeof(A);
  Native part[kParts];
};

template <typename A>
BNK_INLINE Lanes<A> broadcast(A value) {
  Lanes<A> r;
  for (int p = 0; p < kParts; ++p) r.part[p] = value - typename Lanes<A>::Native{};
  return r;
}

template <typename A>
BNK_INLINE Lanes<A> operator+(const Lanes<A>& a, const Lanes<A>& b) {
  Lanes<A> r;
  for (int p = 0; p < kParts; ++p) r.part[p] = a.part[p] + b.part[p];
  return r;
}

template <typename A>
BNK_INLINE Lanes<A> operator-(const Lanes<A>& a, const Lanes<A>& b) {
  Lanes<A> r;
  for (int p = 0; p < kParts; ++p) r.part[p] = a.part[p] - b.part[p];
  return r;
}

template <typename A>
BNK_INLINE Lanes<A> operator*(const Lanes<A>& a, const Lanes<A>& b) {
  Lanes<A> r;
  for (int p = 0; p < kParts; ++p) r.part[p] = a.part[p] * b.part[p];
  return r;
}

// ---- lanes that count, where a run does not end with a whole vector ----

// Lane i of the window that starts at element `remainder` is set if and only if i >= kCount - remainder.
alignas(64) constexpr int32_t kTailMask32[32] = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                                 -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
alignas(64) constexpr int64_t kTailMask64[16] = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};

template <typename A>
struct Mask {
  typename NativeOf<A>::Bits part[kParts];
};

// The mask of the last `remainder` lanes.
template <typename A>
BNK_INLINE Mask<A> last_lanes(int64_t remainder) {
  Mask<A> mask;
  if constexpr (sizeof(A) == 4) {
    std::memcpy(&mask, kTailMask32 + remainder, sizeof(mask));
  } else {
    std::memcpy(&mask, kTailMask64 + remainder, sizeof(mask));
  }
  return mask;
}

// Zero, whatever the lane held (NaN too), where the mask is not set.
template <typename A>
BNK_INLINE Lanes<A> keep(const Lanes<A>& a, const Mask<A>& mask) {
  using Native = typename NativeOf<A>::Vector;
  using Bits = typename NativeOf<A>::Bits;
  Lanes<A> r;
  for (int p = 0; p < kParts; ++p) r.part[p] = (Native)((Bits)a.part[p] & mask.part[p]);
  return r;
}

// ---- memory ----

template <typename A>
BNK_INLINE Lanes<A> load(const A* from) {
  Lanes<A> r;
  std::memcpy(&r, from, sizeof(r));
  return r;
}

template <typename A>
BNK_INLINE void store(A* to, const Lanes<A>& a) {
  std::memcpy(to, &a, sizeof(a));
}

#if BNK_AVX512

BNK_INLINE Lanes<float> load(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {{(NativeFloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)}};
}

BNK_INLINE __m256i to_bfloat16_bits(const Lanes<float>& a) {
  const __m512i bits = (__m512i)a.part[0];
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)a.part[0], (__m512)a.part[0], _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x00400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

BNK_INLINE Lanes<float> load(const Float16* from) {
  return {{(NativeFloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))}};
}

BNK_INLINE __m256i to_float16_bits(const Lanes<float>& a) {
  return _mm512_cvtps_ph((__m512)a.part[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif BNK_AVX2

BNK_INLINE Lanes<float> load(const BFloat16* from) {
  const __m128i* halves = reinterpret_cast<const __m128i*>(from);
  Lanes<float> r;
  for (int p = 0; p < kParts; ++p) {
    r.part[p] = (NativeFloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(halves + p)), 16);
  }
  return r;
}

BNK_INLINE __m256i round_to_bfloat16(NativeFloat a) {
  const __m256i bits = (__m256i)a;
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = (__m256i)_mm256_cmp_ps((__m256)a, (__m256)a, _CMP_UNORD_Q);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}

BNK_INLINE __m256i to_bfloat16_bits(const Lanes<float>& a) {
  // The pack interleaves its operands' 128-bit halves; the permutation puts them in order.
  const __m256i packed = _mm256_packus_epi32(round_to_bfloat16(a.part[0]), round_to_bfloat16(a.part[1]));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}

BNK_INLINE Lanes<float> load(const Float16* from) {
  const __m128i* halves = reinterpret_cast<const __m128i*>(from);
  Lanes<float> r;
  for (int p = 0; p < kParts; ++p) r.part[p] = (NativeFloat)_mm256_cvtph_ps(_mm_loadu_si128(halves + p));
  return r;
}

BNK_INLINE __m256i to_float16_bits(const Lanes<float>& a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_set_m128i(_mm256_cvtps_ph((__m256)a.part[1], kNearest), _mm256_cvtps_ph((__m256)a.part[0], kNearest));
}

#else  // the conversions of scalar.h, lane by lane; those of bfloat16 the compiler vectorises

template <typename Half>
BNK_INLINE Lanes<float> load_lane_by_lane(const Half* from) {
  alignas(64) float lane[16];
  for (int i = 0; i < 16; ++i) lane[i] = to_float(from[i]);
  return load(lane);
}

BNK_INLINE Lanes<float> load(const BFloat16* from) { return load_lane_by_lane(from); }
BNK_INLINE Lanes<float> load(const Float16* from) { return load_lane_by_lane(from); }

BNK_INLINE void store(BFloat16* to, const Lanes<float>& a) {
  alignas(64) float lane[16];
  store(lane, a);
  for (int i = 0; i < 16; ++i) to[i] = to_bfloat16(lane[i]);
}

BNK_INLINE void store(Float16* to, const Lanes<float>& a) {
  alignas(64) float lane[16];
  store(lane, a);
  for (int i = 0; i < 16; ++i) to[i] = to_float16(lane[i]);
}

#endif

#if BNK_AVX2 || BNK_AVX512
BNK_INLINE void store(BFloat16* to, const Lanes<float>& a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bfloat16_bits(a));
}
BNK_INLINE void store(Float16* to, const Lanes<float>& a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_float16_bits(a));
}
#endif

// The first `count` elements of a vector that memory does not hold as a whole; the other lanes are zero.
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

// The sum of all lanes, as a tree, in double.
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
