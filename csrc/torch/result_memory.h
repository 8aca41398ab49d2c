// What results are written to.
#pragma once

#include <ATen/core/Tensor.h>

namespace bnk {

// Uninitialised, of x's shape, dtype and device, dense in the memory format that torch suggests for x.
at::Tensor empty_result_like(const at::Tensor& x);

}  // namespace bnk
