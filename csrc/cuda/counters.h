// Counters: the memory of group barriers. It is zeroed once, and every launch leaves it as the next one needs it, so no call
// spends a launch on it (kernels/primitives.cuh, group_barrier).
//
// Two launches that may run at the same time must not share counters. Those on one stream do not, so each stream has its
// own. Those of a CUDA graph may, whatever the stream they were captured from: each capture has its own, for as long as
// the process lives, as nobody tells when the last replay was. Of one graph, two executions at the same time are not
// supported (one executable graph never has two).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace bnk::cuda {

// At least `count`, on the current device. Allocates when a stream or a capture first asks, in the course of a capture too.
cudaError_t lease_counters(int64_t count, cudaStream_t stream, unsigned** counters);

}  // namespace bnk::cuda
