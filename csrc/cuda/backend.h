// The CUDA backend's entry points. Arguments were checked by ops.cpp; every pointer is memory of the current device.
//
// Each call enqueues its kernels on the stream and returns the first launch error; it neither synchronizes nor
// allocates, so it can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include "../plan.h"
#include "../problem_sync.h"

namespace bnk::cuda {

// The current device's. Asked from the driver once for each device.
cudaError_t current_device_limits(DeviceLimits* limits);

// Whether plans may take every row for aligned: see plan_streaming.
bool is_aligned(const void* data);

// Fits a resident plan to what the device holds at the same time after all: what a plan knows of a device is its limits,
// and drivers and other processes may take a share. Clusters may be fewer; where a group does not fit, or not all of those
// of a cooperative launch, the streaming path is taken. fused: with an epilogue, or behind a ReLU.
cudaError_t confirm(Dtype dtype, Pass pass, bool fused, Plan* plan);

// Scratch memory that the pass needs, in bytes.
int64_t scratch_bytes(const Plan& plan, Pass pass);

// Counters for the pass's groups (counters.h); null where the plan has none.
cudaError_t counters_for(const Plan& plan, cudaStream_t stream, unsigned** counters);

cudaError_t forward_train(const ForwardTrainArgs& args, const Plan& plan, void* scratch, unsigned* counters,
                          cudaStream_t stream);
cudaError_t forward_eval(const ForwardEvalArgs& args, const Plan& plan, cudaStream_t stream);
cudaError_t backward(const BackwardArgs& args, const Plan& plan, void* scratch, unsigned* counters,
                     cudaStream_t stream);

// The steps of a batch on several ranks, on the streaming path. Each needs so many bytes of scratch memory.
namespace sync {
int64_t statistics_scratch(const StreamingPlan& plan);
int64_t grad_sums_scratch(const StreamingPlan& plan);
int64_t grad_input_scratch(const StreamingPlan& plan);
cudaError_t statistics(const StatisticsArgs& args, const StreamingPlan& plan, void* scratch, cudaStream_t stream);
cudaError_t join_statistics(const JoinStatisticsArgs& args, cudaStream_t stream);
cudaError_t normalize(const NormalizeArgs& args, const StreamingPlan& plan, cudaStream_t stream);
cudaError_t grad_sums(const GradSumsArgs& args, const StreamingPlan& plan, void* scratch, cudaStream_t stream);
cudaError_t grad_input(const GradInputArgs& args, const StreamingPlan& plan, void* scratch, cudaStream_t stream);
}  // namespace sync

}  // namespace bnk::cuda
