// Allocation of results.
#pragma once

#include <ATen/core/Tensor.h>

#include "../core/problem.h"

namespace bnk {

// An uninitialized tensor of x's shape, dtype and device, dense in the memory format that torch suggests for x.
at::Tensor empty_result_like(const at::Tensor& x);

// An uninitialized tensor of shape (size,) on x's device. On the CPU this bypasses the dispatcher, which costs more
// than a small allocation.
at::Tensor empty_vector(int64_t size, Dtype dtype, const at::Tensor& x);

}  // namespace bnk
