// Gates: what of a gradient reaches the normalised value.
//
//   behind a ReLU   g where low <= x <= high, else 0      (relu_bounds.h)
//   behind nothing  g
#pragma once

#include <limits>
#include <type_traits>

#include "per_channel.cuh"

namespace bnk {

// Of an interval one end is infinite. The other one and a bit take half the registers of two: where y falls as x rises, both
// are looked at with the other sign.
template <typename opmath_t, int kColumns>
struct ReluBackward {
  opmath_t edge[kColumns];
  unsigned falling = 0;

  BNK_DEVICE void read_channel(const ConstPerChannel& lows, const ConstPerChannel& highs, int column, int64_t channel) {
    const opmath_t low = static_cast<opmath_t>(read(lows, channel));
    const opmath_t high = static_cast<opmath_t>(read(highs, channel));
    const bool falls = high < std::numeric_limits<opmath_t>::infinity();
    edge[column] = falls ? -high : low;
    falling |= falls ? 1u << column : 0;
  }

  // Of a vector's element. An x that is NaN, whose y is NaN, lets g through.
  BNK_DEVICE opmath_t operator()(int element, opmath_t x, opmath_t g) const {
    const int column = element % kColumns;
    const opmath_t side = (falling >> column & 1u) != 0 ? -x : x;
    return side < edge[column] ? opmath_t(0) : g;
  }
};

template <typename opmath_t, int kColumns>
struct IdentityBackward {
  BNK_DEVICE void read_channel(const ConstPerChannel&, const ConstPerChannel&, int, int64_t) {}
  BNK_DEVICE opmath_t operator()(int, opmath_t, opmath_t g) const { return g; }
};

// kHasRelu: the forward ended with a ReLU.
template <bool kHasRelu, typename opmath_t, int kColumns>
using EpilogueBackward =
    std::conditional_t<kHasRelu, ReluBackward<opmath_t, kColumns>, IdentityBackward<opmath_t, kColumns>>;

}  // namespace bnk
