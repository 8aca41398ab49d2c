// The body of a SIMD level: its vectors, its kernels, its table. Included once by each level_*.cpp, inside namespace
// bnk::cpu::<level> and after the pragma that names the level's instructions.
//
// Everything from outside (std, scalar.h) must be included before that pragma: an inline function shared with other
// files, compiled here, could otherwise be the linker's choice for all of them, and not run on lesser processors.

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

// Whether a float sum can be trusted: finite, and not below `floor`. Sums in double are always final.
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
  int32_t bad = 0;  // integers all the way, as only their reductions are vectorised
  for (int i = 0; i < kCount; ++i) {
    int32_t bits;
    std::memcpy(&bits, sums + i, sizeof(bits));
    bad |= ((bits & 0x7fffffff) >= 0x7f800000 ? 1 : 0) | (sums[i] < least ? 1 : 0);
  }
  return bad == 0;
}

// NaN stays.
BNK_INLINE double not_negative(double value) { return value < 0 ? 0 : value; }

#include "epilogue.h"
// after these two, which both kinds of kernels use
#include "row_kernels.h"
// after row_kernels.h, whose exact_* the column kernels use
#include "column_spans.h"
// after how columns are walked
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
