// The translation unit of the Python module, which reads pybind11's headers once (aten_unit.cpp).
#include "bindings.cpp"
#include "bindings_plan.cpp"
