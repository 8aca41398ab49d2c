// The CUDA backend's entry points. Arguments were checked by ops.cpp; every pointer is memory of the current device.
//
// Each call plans, enqueues its kernels on the stream and returns the first error. It does not synchronize, so it can be
// captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "../core/problem_sync.h"
#include "../plan/plan.h"

namespace bnk::cuda {

// What the backend asks of its caller, on the current device. Each may throw.
class Host {
 public:
  // Uninitialized memory for work on the call's stream, valid until this object ends.
  virtual void* scratch(int64_t bytes) = 0;
  // Memory that is zero, aligned to 256 bytes and never freed. The call's stream may be capturing.
  virtual void* zeros(int64_t bytes) = 0;
  virtual void warn(const std::string& message) = 0;

 protected:
  ~Host() = default;
};

// The current device's, as far as this build can use them: without code for clusters, max_cluster is 0. Queried once for
// each device.
cudaError_t current_device_limits(DeviceLimits* limits);

cudaError_t forward_train(const ForwardTrainArgs& args, const PlanOptions& options, cudaStream_t stream, Host& host);
cudaError_t forward_eval(const ForwardEvalArgs& args, cudaStream_t stream);
cudaError_t backward(const BackwardArgs& args, const PlanOptions& options, cudaStream_t stream, Host& host);

// The steps of a batch on several ranks, on the two-pass path.
namespace sync {
cudaError_t statistics(const StatisticsArgs& args, cudaStream_t stream, Host& host);
cudaError_t combine_statistics(const CombineStatisticsArgs& args, cudaStream_t stream);
cudaError_t normalize(const NormalizeArgs& args, cudaStream_t stream);
cudaError_t grad_sums(const GradSumsArgs& args, cudaStream_t stream, Host& host);
cudaError_t grad_input(const GradInputArgs& args, cudaStream_t stream, Host& host);
}  // namespace sync

}  // namespace bnk::cuda
