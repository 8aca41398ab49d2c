// Device memory: host pages. Allocations are separated by guard pages, and their contents are initially undefined (all
// bits set).
//
// This replaces simt/buffers.cpp below the engine: every access of the primitives is looked up here, so a kernel faults
// if it accesses memory that is not allocated, has been freed, or belongs to another device.
#pragma once

#include <cstddef>

namespace fake_cuda {

// Null if the system is out of memory. `bytes` is exact: the next byte is outside the allocation.
void* allocate(int device, size_t bytes);
// Returns false if there is no such allocation.
bool deallocate(void* memory);

// The device whose allocation contains all of these bytes, or -1.
int device_of(const void* memory, size_t bytes = 1);

size_t allocated(int device);

// Host memory that the device can access directly (cudaMallocHost, cudaHostRegister).
void* allocate_pinned(size_t bytes);
bool deallocate_pinned(void* memory);
void register_pinned(void* memory, size_t bytes);
bool unregister_pinned(void* memory);
bool is_pinned(const void* memory);

// Sets the device on which subsequent kernels run; they may access only its memory.
void enter_kernel(int device);

}  // namespace fake_cuda
