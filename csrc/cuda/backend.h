// Entry points of the CUDA backend. torch/ops.cpp has checked the arguments; every pointer is memory of the current
// device.
//
// Each call plans, enqueues its kernels on the stream and returns the first error. It does not synchronize, so it can
// be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "../core/problem_sync.h"
#include "../plan/plan.h"

namespace bnk::cuda {

// Services that the caller provides, for the current device. Each function may throw.
class Host {
 public:
  // Uninitialized memory for work on the call's stream, valid until this object is destroyed.
  virtual void* scratch(int64_t bytes) = 0;
  // Zeroed memory, aligned to 256 bytes and never freed. The call's stream may be capturing.
  virtual void* zeros(int64_t bytes) = 0;
  virtual void warn(const std::string& message) = 0;

 protected:
  ~Host() = default;
};

// The stream, options and services of a call.
struct Context {
  cudaStream_t stream;
  PlanOptions options;
  Host& host;
};

// The limits of the current device for this build: max_cluster is 0 if the build has no code for clusters. Queried once
// per device.
cudaError_t current_device_limits(DeviceLimits* limits);

cudaError_t forward_train(const ForwardTrainArgs& args, const Context& context);
cudaError_t forward_eval(const ForwardEvalArgs& args, const Context& context);
cudaError_t backward(const BackwardArgs& args, const Context& context);

// The steps of synchronized BatchNorm (core/problem_sync.h), on the two-pass path.
cudaError_t statistics(const StatisticsArgs& args, const Context& context);
cudaError_t combine_statistics(const CombineStatisticsArgs& args, const Context& context);
cudaError_t normalize(const NormalizeArgs& args, const Context& context);
cudaError_t grad_sums(const GradSumsArgs& args, const Context& context);
cudaError_t grad_input(const GradInputArgs& args, const Context& context);

}  // namespace bnk::cuda
