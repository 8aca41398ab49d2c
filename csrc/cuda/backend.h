// The CUDA backend's entry points. Arguments were checked by ops.cpp; every pointer is memory of the current device.
//
// Each call enqueues its kernels on the stream and returns the first launch error; it neither synchronizes nor
// allocates, so it can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include "../plan.h"

namespace bnk::cuda {

// The current device's, from attributes that the driver keeps: cheap enough for every call, allowed in a capture.
cudaError_t current_device_limits(DeviceLimits* limits);

// Whether plans may take every row for aligned: see plan_streaming.
bool is_aligned(const void* data);

// Scratch memory that the call of this plan needs, in bytes.
int64_t forward_train_scratch_bytes(const StreamingPlan& plan);
int64_t backward_scratch_bytes(const StreamingPlan& plan);

cudaError_t forward_train(const ForwardTrainArgs& args, const StreamingPlan& plan, void* scratch, cudaStream_t stream);
cudaError_t forward_eval(const ForwardEvalArgs& args, const StreamingPlan& plan, cudaStream_t stream);
cudaError_t backward(const BackwardArgs& args, const StreamingPlan& plan, void* scratch, cudaStream_t stream);

}  // namespace bnk::cuda
