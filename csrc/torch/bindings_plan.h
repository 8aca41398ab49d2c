// Python bindings of the planner: pure arithmetic that needs no GPU.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace bnk {

// Adds plan() and device_limits() to the module.
void bind_plan(pybind11::module_& module);

}  // namespace bnk
