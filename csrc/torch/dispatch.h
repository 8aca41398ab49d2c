// Runs a call on the device of its tensors: by the CPU backend, or by the CUDA backend on that device's current stream.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../core/problem_sync.h"
#include "../plan/plan.h"

namespace bnk {

// `x`: a tensor on the device. CUDA work is enqueued, not waited for.
void run(const ForwardTrainArgs& args, const at::Tensor& x);
void run(const ForwardEvalArgs& args, const at::Tensor& x);
void run(const BackwardArgs& args, const at::Tensor& x);
void run(const StatisticsArgs& args, const at::Tensor& x);
void run(const CombineStatisticsArgs& args, const at::Tensor& x);
void run(const NormalizeArgs& args, const at::Tensor& x);
void run(const GradSumsArgs& args, const at::Tensor& x);
void run(const GradInputArgs& args, const at::Tensor& x);

// What plans are made from for a CUDA device. Raises where CUDA is not built, or has no such device.
DeviceLimits device_limits(int device);

// The barrier words of a CUDA device, in use or not, for tests: views of shape (workspaces, kBarrierWords), int32.
std::vector<at::Tensor> barrier_workspace(int device);

}  // namespace bnk
