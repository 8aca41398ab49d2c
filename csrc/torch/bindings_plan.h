// The plan as Python sees it: pure arithmetic, no GPU is asked and none needs to be there.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace bnk {

// Adds plan() and device_limits() to the module.
void bind_plan(pybind11::module_& module);

}  // namespace bnk
