// The translation unit of the Python module, which reads pybind11's headers once (ops_unit.cpp).
#include "binding.cpp"
#include "binding_plan.cpp"
