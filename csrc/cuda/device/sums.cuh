// Two sums that are gathered together, in double.
#pragma once

#include "../ptx.cuh"

namespace bnk {

struct Sums {
  double first;
  double second;
};

BNK_DEVICE void combine(Sums& a, const Sums& b) {
  a.first += b.first;
  a.second += b.second;
}

BNK_DEVICE Sums shuffle_xor(const Sums& sums, int mask) {
  return {shuffle_xor(sums.first, mask), shuffle_xor(sums.second, mask)};
}

BNK_DEVICE void combine(double& a, const double& b) { a += b; }

}  // namespace bnk
