// Runs a call on the device of its tensors, with the CPU backend or with the CUDA backend on that device's current
// stream.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../core/problem_sync.h"
#include "../plan/plan.h"

namespace bnk {

// `x`: a tensor on the device. CUDA work is enqueued without waiting for it.
void run(const ForwardTrainArgs& args, const at::Tensor& x);
void run(const ForwardEvalArgs& args, const at::Tensor& x);
void run(const BackwardArgs& args, const at::Tensor& x);
void run(const StatisticsArgs& args, const at::Tensor& x);
void run(const CombineStatisticsArgs& args, const at::Tensor& x);
void run(const NormalizeArgs& args, const at::Tensor& x);
void run(const GradSumsArgs& args, const at::Tensor& x);
void run(const GradInputArgs& args, const at::Tensor& x);

// The planner's inputs for a CUDA device. Throws if the build has no CUDA support or the device does not exist.
DeviceLimits device_limits(int device);

// The barrier words of a CUDA device, whether in use or not, for tests: int32 views of shape (workspaces,
// kBarrierWords).
std::vector<at::Tensor> barrier_workspace(int device);

}  // namespace bnk
