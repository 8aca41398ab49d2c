// The body of a SIMD level: its vectors, its kernels and its function table. Included once by each level_*.cpp, inside
// namespace bnk::cpu::<level> and after the pragma that selects the level's instructions.
//
// All other headers (std, scalar.h) must be included before that pragma. Otherwise, the linker could pick the copy of
// an inline function that is compiled here for the whole program, which would then fail on older processors.

template <typename T>
struct AccumulateOf {
  using Type = float;
};
template <>
struct AccumulateOf<double> {
  using Type = double;
};
template <typename T>
using Accumulate = typename AccumulateOf<T>::Type;

#include "lanes.h"

BNK_INLINE double to_double(double value) { return value; }
BNK_INLINE double to_double(float value) { return value; }
BNK_INLINE double to_double(BFloat16 value) { return to_float(value); }
BNK_INLINE double to_double(Float16 value) { return to_float(value); }

// Whether a float sum can be trusted: it is finite and not below `floor`. Sums in double are always accepted.
template <typename A>
BNK_INLINE bool in_range(double sum, double floor = -__builtin_huge_val()) {
  return sizeof(A) == sizeof(double) || ((sum >= floor) & (__builtin_fabs(sum) < __builtin_huge_val()));
}

template <int kCount>
BNK_INLINE bool all_in_range(const double*, double = 0) {
  return true;
}
template <int kCount>
BNK_INLINE bool all_in_range(const float* sums, double floor = -__builtin_huge_val()) {
  const float least = static_cast<float>(floor);
  int32_t bad = 0;  // integers throughout, since only integer reductions are vectorized
  for (int i = 0; i < kCount; ++i) {
    int32_t bits;
    std::memcpy(&bits, sums + i, sizeof(bits));
    bad |= ((bits & 0x7fffffff) >= 0x7f800000 ? 1 : 0) | (sums[i] < least ? 1 : 0);
  }
  return bad == 0;
}

// Clamps to 0 from below; NaN stays NaN.
BNK_INLINE double not_negative(double value) { return value < 0 ? 0 : value; }

#include "epilogue.h"
// Needs the two above, which both kinds of kernels use.
#include "row_kernels.h"
// Needs row_kernels.h: the column kernels use its exact_*.
#include "column_spans.h"
// Needs column_spans.h.
#include "column_kernels.h"

template <typename T>
constexpr Kernels table() {
  return {row_welford<T>,      row_normalize<T>, row_sums<T>,        row_gradient<T>, column_welford<T>,
          column_normalize<T>, column_sums<T>,   column_gradient<T>, end_of_stream};
}

const Kernels& kernels(Dtype dtype) {
#if BNK_AVX512_BF16
  static constexpr Kernels kTable = table<BFloat16>();
  return dtype == Dtype::kBFloat16 ? kTable : avx512::kernels(dtype);
#else
  static constexpr Kernels kTables[] = {table<double>(), table<float>(), table<Float16>(), table<BFloat16>()};
  return kTables[static_cast<int>(dtype)];
#endif
}
