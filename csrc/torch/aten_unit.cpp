// The translation unit of the ops. Parsing torch's headers takes longer than compiling any of these files, so they
// share one parse.
#include "arguments.cpp"
#include "dispatch.cpp"
#include "ops.cpp"
#include "ops_sync.cpp"
#include "result_memory.cpp"
