// Welford data: count, mean and sum of squared deviations of a set of values. Two sets can be combined.
//
// Values are taken tile by tile, from registers, in two passes: the tile's mean, then the deviations from it (never
// E[x^2] - E[x]^2). Tiles are combined by the parallel formula of Chan, Golub & LeVeque, "Updating formulae and a
// pairwise algorithm for computing sample variances" (1979), in double: the combined mean loses no precision however
// far it is from zero, and a sum of squares cannot overflow for float data. One combine per tile costs a fraction of an
// operation per element.
#pragma once

#include "../ptx.cuh"

namespace bnk {

// WelfordData{} is the empty set.
struct WelfordData {
  double count;
  double mean;
  double m2;
};

// fraction = b.count / (a.count + b.count)
BNK_DEVICE void combine(WelfordData& a, const WelfordData& b, double fraction) {
  if (a.count == 0) {
    a = b;
    return;
  }
  const double delta = b.mean - a.mean;
  a.m2 = fused_multiply_add(delta * delta, a.count * fraction, a.m2 + b.m2);
  a.mean = fused_multiply_add(delta, fraction, a.mean);
  a.count += b.count;
}

BNK_DEVICE void combine(WelfordData& a, const WelfordData& b) {
  if (b.count == 0) return;
  combine(a, b, b.count / (a.count + b.count));
}

BNK_DEVICE WelfordData shuffle_xor(const WelfordData& m, int mask) {
  return {shuffle_xor(m.count, mask), shuffle_xor(m.mean, mask), shuffle_xor(m.m2, mask)};
}

// Two passes over the kCount values at(i). If kMasked, only values with has(i) count; the others must read as 0.
template <typename opmath_t, int kCount, bool kMasked, typename At, typename Has>
BNK_DEVICE WelfordData welford_of(int count, const At& at, const Has& has) {
  opmath_t sum = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += at(i);
  const opmath_t number = static_cast<opmath_t>(kMasked ? count : kCount);
  const opmath_t mean = sum / number;

  opmath_t residual = 0;  // sum of deviations: the rounding error of the mean
  opmath_t squares = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const opmath_t deviation = !kMasked || has(i) ? at(i) - mean : opmath_t(0);
    residual += deviation;
    squares = fused_multiply_add(deviation, deviation, squares);
  }
  const double correction = static_cast<double>(residual / number);
  const double m2 = fused_multiply_add(-correction, static_cast<double>(residual), static_cast<double>(squares));
  return {static_cast<double>(count), static_cast<double>(mean) + correction, m2 < 0 ? 0 : m2};
}

// WelfordData of a tile of kCount values in registers, of which `count` >= 1 are valid. Sums in the values' own type;
// if those overflow (finite floats whose squares do not fit), sums again in double, which cannot overflow.
template <int kCount, typename At, typename Has>
BNK_DEVICE WelfordData tile_welford(int count, const At& at, const Has& has) {
  using Value = decltype(at(0));
  const WelfordData tile = count == kCount ? welford_of<Value, kCount, false>(count, at, has)
                                           : welford_of<Value, kCount, true>(count, at, has);
  return is_finite(tile.m2) ? tile : welford_of<double, kCount, true>(count, at, has);
}

// Combines a tile with a thread's running Welford data. The fraction is rounded to Value, which moves the mean by less
// than a rounding of the deviations and saves a double division per tile.
template <typename Value>
BNK_DEVICE void combine_tile(WelfordData& total, const WelfordData& tile) {
  const auto fraction = static_cast<Value>(tile.count) / static_cast<Value>(total.count + tile.count);
  combine(total, tile, static_cast<double>(fraction));
}

}  // namespace bnk
