// The translation unit of the ops. Each of these files takes longer to read torch's headers than to compile: together they
// read them once.
#include "arguments.cpp"
#include "dispatch.cpp"
#include "ops.cpp"
#include "ops_sync.cpp"
#include "result_memory.cpp"
