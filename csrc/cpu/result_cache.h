// Memory of large results, kept for the next ones.
//
// A system's allocator gives large blocks back when they are freed, and the next result starts on pages that the system
// first has to find and clear: more time than the arithmetic takes. Blocks from here stay mapped when their result is
// freed, and the next result of about that size finds its pages there. What is kept is the system's to take: all but the
// blocks freed last are marked as free, so that their pages go first when memory is short, and are not written to a swap.
#pragma once

#include <cstddef>

namespace bnk::cpu {

// A block for `bytes`, its contents undefined. nullptr where keeping does not pay or is turned off, or where the system has
// no more: then it is the caller's to find memory elsewhere.
void* take_memory(size_t bytes);

// Of a block from take_memory(bytes), which nobody uses any more.
void give_memory_back(void* data, size_t bytes);

// Unmaps what is kept; how many bytes that was.
size_t empty_result_cache();

}  // namespace bnk::cpu
