// The translation unit of the Python module, which parses pybind11's headers once (see aten_unit.cpp).
#include "bindings.cpp"
#include "bindings_plan.cpp"
