// Device memory: pages of the host, each allocation apart from the others, its contents undefined (all bits set) at first.
//
// It takes the place of simt/buffers.cpp below the engine: the primitives' every access is looked up here, so a kernel
// that reaches memory which is not allocated, no more allocated, or another device's ends in a fault.
#pragma once

#include <cstddef>

namespace fake_cuda {

// Null where the system has no more. `bytes` is exact: the byte behind is not the allocation's.
void* allocate(int device, size_t bytes);
// Whether there was such an allocation.
bool deallocate(void* memory);

// The device whose allocation holds all of these bytes; -1: none.
int device_of(const void* memory, size_t bytes = 1);

size_t allocated(int device);

// Host memory that the device reaches by itself (cudaMallocHost, cudaHostRegister).
void* allocate_pinned(size_t bytes);
bool deallocate_pinned(void* memory);
void register_pinned(void* memory, size_t bytes);
bool unregister_pinned(void* memory);
bool is_pinned(const void* memory);

// The device that kernels run on from now on; its memory is the only one that they may touch.
void enter_kernel(int device);

}  // namespace fake_cuda
