// What results are written to.
#pragma once

#include <ATen/core/Tensor.h>

#include "../core/problem.h"

namespace bnk {

// Uninitialised, of x's shape, dtype and device, dense in the memory format that torch suggests for x.
at::Tensor empty_result_like(const at::Tensor& x);

// Uninitialised, of shape (size,), on x's device. A small allocation on the CPU takes no way through the dispatcher, which costs
// more than the allocation.
at::Tensor empty_vector(int64_t size, Dtype dtype, const at::Tensor& x);

}  // namespace bnk
