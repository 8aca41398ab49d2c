// Gates: what of a gradient reaches the normalised value.
//
//   behind a ReLU   g where low <= x <= high, else 0      (relu_range.h)
//   behind nothing  g
#pragma once

#include <limits>
#include <type_traits>

#include "per_channel.cuh"

namespace bnk {

// Of an interval one end is infinite. The other one and a bit take half the registers of two: where y falls as x rises, both
// are looked at with the other sign.
template <typename Real, int kColumns>
struct ReluGate {
  Real edge[kColumns];
  unsigned falling = 0;

  BNK_DEVICE void read_channel(const ConstPerChannel& lows, const ConstPerChannel& highs, int column, int64_t channel) {
    const Real low = static_cast<Real>(read(lows, channel));
    const Real high = static_cast<Real>(read(highs, channel));
    const bool falls = high < std::numeric_limits<Real>::infinity();
    edge[column] = falls ? -high : low;
    falling |= falls ? 1u << column : 0;
  }

  // Of a window's element. An x that is NaN, whose y is NaN, lets g through.
  BNK_DEVICE Real operator()(int element, Real x, Real g) const {
    const int column = element % kColumns;
    const Real side = (falling >> column & 1u) != 0 ? -x : x;
    return side < edge[column] ? Real(0) : g;
  }
};

template <typename Real, int kColumns>
struct OpenGate {
  BNK_DEVICE void read_channel(const ConstPerChannel&, const ConstPerChannel&, int, int64_t) {}
  BNK_DEVICE Real operator()(int, Real, Real g) const { return g; }
};

// kGated: the forward ended with a ReLU.
template <bool kGated, typename Real, int kColumns>
using GateIf = std::conditional_t<kGated, ReluGate<Real, kColumns>, OpenGate<Real, kColumns>>;

}  // namespace bnk
