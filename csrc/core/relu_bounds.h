// ReLU bounds: the interval of x for which a ReLU after BatchNorm passes its input.
//
// y = ((x - mean)*invstd)*weight + bias is a sequence of rounded operations, each monotone in its operand: as x
// increases, y never decreases (weight >= 0) or never increases (weight < 0). So {x : y > 0} is an interval with one
// infinite end, and the backward reproduces the forward's ReLU from two values per channel, without reading y or a mask
// and without recomputing y. Binary-search the representable floats for the finite end, with the forward's exact
// arithmetic, so that the bound matches it bit for bit.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define BNK_HOST_DEVICE __host__ __device__ inline
#else
#define BNK_HOST_DEVICE inline
#endif

namespace bnk {

template <typename opmath_t>
struct ReluBounds {
  opmath_t low;
  opmath_t high;
};

namespace relu_bounds_detail {

template <typename opmath_t>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = int32_t;
  using Unsigned = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = int64_t;
  using Unsigned = uint64_t;
};

// Maps the bits of a float to an integer of the same order. The mapping is its own inverse.
template <typename Key>
BNK_HOST_DEVICE Key ordered(Key bits) {
  constexpr Key kAllButSign = std::numeric_limits<Key>::max();
  return bits < 0 ? bits ^ kAllButSign : bits;
}

template <typename opmath_t>
BNK_HOST_DEVICE typename KeyOf<opmath_t>::type key_of(opmath_t value) {
  typename KeyOf<opmath_t>::type bits;
  std::memcpy(&bits, &value, sizeof bits);
  return ordered(bits);
}

template <typename opmath_t>
BNK_HOST_DEVICE opmath_t value_of(typename KeyOf<opmath_t>::type key) {
  const auto bits = ordered(key);
  opmath_t value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The bound usually lies within this many representable floats of the estimate.
inline constexpr int kNear = 8;

// The smallest value that passes, given that all larger values pass too. Returns infinity, which always passes, if no
// finite value passes.
template <typename opmath_t, typename Passes>
BNK_HOST_DEVICE opmath_t first_passing(opmath_t estimate, const Passes& passes) {
  using Key = typename KeyOf<opmath_t>::type;
  using Unsigned = typename KeyOf<opmath_t>::Unsigned;
  constexpr opmath_t kLargest = std::numeric_limits<opmath_t>::max();
  constexpr opmath_t kInfinity = std::numeric_limits<opmath_t>::infinity();
  if (passes(-kLargest)) return passes(-kInfinity) ? -kInfinity : -kLargest;
  if (!passes(kLargest)) return kInfinity;
  Key last = key_of(-kLargest);  // known not to pass
  Key first = key_of(kLargest);  // known to pass
  const auto probe = [&](Key key) { (passes(value_of<opmath_t>(key)) ? first : last) = key; };
  if (estimate > -kLargest && estimate < kLargest) {
    const Key near = key_of(estimate);
    const Key below = near > last + kNear ? near - kNear : last;
    const Key above = near < first - kNear ? near + kNear : first;
    if (below > last) probe(below);
    if (above < first && above > last) probe(above);
  }
  for (;;) {
    const Unsigned between = static_cast<Unsigned>(first) - static_cast<Unsigned>(last);
    if (between <= 1) return value_of<opmath_t>(first);
    probe(static_cast<Key>(static_cast<Unsigned>(last) + between / 2));
  }
}

}  // namespace relu_bounds_detail

// passes(x): whether the forward's y(x), in the forward's exact arithmetic, is not <= 0. NaN passes, as in torch.
template <typename opmath_t, typename Passes>
BNK_HOST_DEVICE ReluBounds<opmath_t> relu_bounds(opmath_t mean, opmath_t invstd, opmath_t weight, opmath_t bias,
                                                 const Passes& passes) {
  constexpr opmath_t kInfinity = std::numeric_limits<opmath_t>::infinity();
  // All finite x then have the same y, and infinite x are treated alike. Evaluate at the mean: far from it the
  // deviation may overflow, and infinity times 0 is NaN.
  if (weight == 0 || invstd == 0) return {passes(mean) ? -kInfinity : kInfinity, kInfinity};
  const opmath_t estimate = mean - bias / weight / invstd;
  if (weight < 0) {
    const opmath_t first = relu_bounds_detail::first_passing(-estimate, [&](opmath_t x) { return passes(-x); });
    return {-kInfinity, -first};
  }
  return {relu_bounds_detail::first_passing(estimate, passes), kInfinity};
}

}  // namespace bnk
