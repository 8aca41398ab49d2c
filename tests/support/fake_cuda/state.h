// What the parts of the runtime share: errors, the current device, and what a device has.
#pragma once

#include <cuda_runtime_api.h>

#include <mutex>
#include <string>

#include "plan/plan.h"

namespace fake_cuda {

inline constexpr int kDevices = 2;  // so that work which goes to the wrong one is seen

// As a Hopper GPU's, but for its few multiprocessors: small tensors meet every kind of group of blocks.
// FAKE_CUDA_MULTIPROCESSORS overrides their number, FAKE_CUDA_MAX_CLUSTER the largest cluster (0: no clusters).
const bnk::DeviceLimits& limits();

// What a multiprocessor holds at the same time, whatever the limits say: FAKE_CUDA_BLOCKS_PER_MULTIPROCESSOR. On a GPU it may be
// fewer for registers, or as a driver or other processes take a share.
int most_blocks_beside();

// Bytes of memory of each device: FAKE_CUDA_MEMORY_MB (4096).
size_t global_memory();

// What this device refuses though its limits allow it: a word in FAKE_CUDA_REFUSES (comma-separated).
//   cooperative    every cooperative launch, as a green context of few multiprocessors does
//   clusters       every cluster, when asked how many fit and when launched
//   resources      every launch of a persistent kernel, as registers of an instrumented kernel can
bool refuses(const char* what);

// The architecture whose PTX the kernels were compiled from: FAKE_CUDA_PTX (90). The machine code is always sm_90's.
int ptx_version();

// The calling thread's device.
int current_device();
void set_current_device(int device);

// What every entry point returns: remembers an error until it is asked for. After a fault, which like CUDA's is never
// forgotten, it is the fault's.
cudaError_t result(cudaError_t error);
cudaError_t take_error();
cudaError_t peek_error();

// A kernel did what it must not: printed, and every call from now on fails with cudaErrorLaunchFailure.
void fault(const std::string& text);
bool has_faulted();

// An entry point that was called with what this runtime does not do. Printed, as torch tells the error's name only.
cudaError_t unsupported(const std::string& what);

// Held by whoever looks at or changes streams, events, graphs and allocations; never while work runs.
std::unique_lock<std::mutex> lock();

}  // namespace fake_cuda
