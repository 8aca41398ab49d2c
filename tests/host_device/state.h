// What the parts of the runtime share: errors, the current device, and what a device has.
#pragma once

#include <cuda_runtime_api.h>

#include <mutex>
#include <string>

#include "plan.h"

namespace host_device {

inline constexpr int kDevices = 2;  // so that work which goes to the wrong one is seen

// As a Hopper GPU's, but for its few multiprocessors: small tensors meet every kind of group of blocks.
// HOST_DEVICE_MULTIPROCESSORS overrides their number.
const bnk::DeviceLimits& limits();

// What a multiprocessor holds at the same time, whatever the limits say: HOST_DEVICE_BLOCKS_BESIDE. On a GPU it may be
// fewer for registers, or as a driver or other processes take a share.
int most_blocks_beside();

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

}  // namespace host_device
