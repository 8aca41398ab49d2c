// State shared by the parts of the runtime: errors, the current device, and the properties of a device.
#pragma once

#include <cuda_runtime_api.h>

#include <mutex>
#include <string>

#include "plan/plan.h"

namespace fake_cuda {

inline constexpr int kDevices = 2;  // more than one, so that tests detect work on the wrong device

// The limits of a Hopper GPU, except for fewer multiprocessors, so that small tensors use every kind of CTA group.
// FAKE_CUDA_MULTIPROCESSORS overrides their number, FAKE_CUDA_MAX_CLUSTER the largest cluster (0: no clusters).
const bnk::DeviceLimits& limits();

// Blocks that fit on a multiprocessor at the same time, independent of the limits: FAKE_CUDA_BLOCKS_PER_MULTIPROCESSOR.
// On a GPU there may be fewer because of registers, or because a driver or other processes use some of it.
int max_blocks_per_multiprocessor_limit();

// Memory of each device in bytes: FAKE_CUDA_MEMORY_MB (4096).
size_t global_memory();

// Launches that this device refuses although its limits allow them: words in FAKE_CUDA_REFUSES (comma-separated).
//   cooperative    every cooperative launch, as in a green context with few multiprocessors
//   clusters       every cluster, in occupancy queries and launches
//   resources      every launch of a persistent kernel, as can happen through the registers of an instrumented kernel
bool refuses(const char* what);

// The architecture whose PTX the kernels were compiled from: FAKE_CUDA_PTX (90). The machine code is always sm_90.
int ptx_version();

// The current device of the calling thread.
int current_device();
void set_current_device(int device);

// The return value of every entry point. Stores an error until it is queried. After a fault it always returns the
// fault's error, which, as in CUDA, is sticky.
cudaError_t result(cudaError_t error);
cudaError_t take_error();
cudaError_t peek_error();

// Reports an illegal operation of a kernel: prints it, and makes every subsequent call fail with
// cudaErrorLaunchFailure.
void fault(const std::string& text);
bool has_faulted();

// Reports a call that this runtime does not support. Prints it, since torch shows only the error's name.
cudaError_t unsupported(const std::string& what);

// Must be held to access streams, events, graphs and allocations, and never while work runs.
std::unique_lock<std::mutex> lock();

}  // namespace fake_cuda
