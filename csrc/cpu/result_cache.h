// Result cache: a caching allocator for large results.
//
// The system allocator unmaps large blocks when they are freed, so the next result starts on pages that the kernel
// first has to find and clear, which takes longer than the arithmetic. Blocks of this cache stay mapped when their
// result is freed, and the next result of about that size reuses their pages. The system can reclaim cached memory: all
// blocks but the most recently freed ones are marked as free (MADV_FREE), so when memory is short their pages are
// reclaimed first, without being written to swap.
#pragma once

#include <cstddef>

namespace bnk::cpu {

// Returns an uninitialized block of `bytes` bytes. Returns nullptr if `bytes` is too small to benefit, if the cache is
// disabled or if the system is out of memory; the caller then has to allocate elsewhere.
void* take_memory(size_t bytes);

// Returns a block from take_memory(bytes) that is no longer in use to the cache.
void give_memory_back(void* data, size_t bytes);

// Unmaps all cached blocks and returns their size in bytes.
size_t empty_result_cache();

}  // namespace bnk::cpu
