// Per-channel vectors: parameters and statistics of any dtype, read and written one value at a time.
//
// The dtype is dispatched at run time: a thread reads each value once, not once per element, and the kernels need no
// instantiation per combination of dtypes.
#pragma once

#include "../../core/problem.h"
#include "../ptx.cuh"

namespace bnk {

BNK_DEVICE double read(const ConstPerChannel& vector, int64_t channel) {
  switch (vector.dtype) {
    case Dtype::kFloat64:
      return load(static_cast<const double*>(vector.data) + channel);
    case Dtype::kFloat32:
      return to_opmath(load(static_cast<const float*>(vector.data) + channel));
    case Dtype::kFloat16:
      return to_opmath(load(static_cast<const Half*>(vector.data) + channel));
    default:
      return to_opmath(load(static_cast<const BFloat16*>(vector.data) + channel));
  }
}

BNK_DEVICE double read_or(const ConstPerChannel& vector, int64_t channel, double otherwise) {
  return vector.data == nullptr ? otherwise : read(vector, channel);
}

// Does nothing if the vector is null. 16-bit values are rounded twice, double -> float -> 16-bit, as in torch.
BNK_DEVICE void write(const PerChannel& vector, int64_t channel, double value) {
  if (vector.data == nullptr) return;
  switch (vector.dtype) {
    case Dtype::kFloat64:
      return store(static_cast<double*>(vector.data) + channel, value);
    case Dtype::kFloat32:
      return store(static_cast<float*>(vector.data) + channel, static_cast<float>(value));
    case Dtype::kFloat16:
      return store(static_cast<Half*>(vector.data) + channel, from_opmath<Half>(static_cast<float>(value)));
    default:
      return store(static_cast<BFloat16*>(vector.data) + channel, from_opmath<BFloat16>(static_cast<float>(value)));
  }
}

}  // namespace bnk
