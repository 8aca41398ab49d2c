#include "backend.h"

#include <c10/util/Exception.h>

#include "cpu/backend.h"

#ifdef BNK_WITH_CUDA
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdlib>
#include <string>

#include "cuda/backend.h"
#endif

namespace bnk {

#ifdef BNK_WITH_CUDA
namespace {

// BNKERNELS_PLAN=streaming takes the streaming path for everything; read once.
PlanOptions plan_options() {
  const char* value = std::getenv("BNKERNELS_PLAN");
  const std::string text = value == nullptr ? "" : value;
  TORCH_CHECK(text.empty() || text == "auto" || text == "streaming", "BNKERNELS_PLAN=", text,
              ": expected auto or streaming");
  return {.force_streaming = text == "streaming"};
}

Plan plan_for(const Problem& problem, Pass pass, bool fused, const void* lead) {
  static const PlanOptions options = plan_options();
  DeviceLimits limits;
  C10_CUDA_CHECK(cuda::current_device_limits(&limits));
  Plan plan = plan_pass(problem, pass, cuda::is_aligned(lead), limits, options);
  C10_CUDA_CHECK(cuda::confirm(problem.dtype, pass, fused, &plan));
  return plan;
}

StreamingPlan streaming_plan_for(const Problem& problem, const void* lead) {
  DeviceLimits limits;
  C10_CUDA_CHECK(cuda::current_device_limits(&limits));
  return plan_streaming(problem, cuda::is_aligned(lead), limits);
}

// Backward without grad_x, or of inference, has no result that waits for the sums: nothing is to be kept.
Pass pass_of(const BackwardArgs& args) {
  return args.training && args.grad_x != nullptr ? Pass::kBackwardTrain : Pass::kBackwardEval;
}

// From the caching allocator, on the current stream: reused without a synchronization.
at::Tensor scratch_like(const at::Tensor& x, int64_t bytes) { return at::empty({bytes}, x.options().dtype(at::kByte)); }

unsigned* counters_of(const Plan& plan, cudaStream_t stream) {
  unsigned* counters = nullptr;
  C10_CUDA_CHECK(cuda::counters_for(plan, stream, &counters));
  return counters;
}

}  // namespace
#else
namespace {

[[noreturn]] void no_cuda(const char* wanted) {
  TORCH_CHECK(false, "bnkernels was built for the CPU only, but ", wanted,
              ". Build it again where torch.version.cuda is set and nvcc is on PATH (FORCE_CUDA=1 makes a build fail "
              "that would leave CUDA out)");
}

constexpr const char* kInputOnCuda = "the input is on a CUDA device";

}  // namespace
#endif

void run_forward_train(const ForwardTrainArgs& args, const at::Tensor& x) {
  if (x.is_cpu()) return cpu::forward_train(args);
#ifdef BNK_WITH_CUDA
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Plan plan = plan_for(args.problem, Pass::kForwardTrain, args.epilogue.is_there(), args.x);
  const at::Tensor scratch = scratch_like(x, cuda::scratch_bytes(plan, Pass::kForwardTrain));
  C10_CUDA_CHECK(cuda::forward_train(args, plan, scratch.data_ptr(), counters_of(plan, stream), stream));
#else
  no_cuda(kInputOnCuda);
#endif
}

void run_forward_eval(const ForwardEvalArgs& args, const at::Tensor& x) {
  if (x.is_cpu()) return cpu::forward_eval(args);
#ifdef BNK_WITH_CUDA
  const c10::cuda::CUDAGuard guard(x.device());
  const Plan plan = plan_for(args.problem, Pass::kForwardEval, args.epilogue.is_there(), args.x);
  C10_CUDA_CHECK(cuda::forward_eval(args, plan, c10::cuda::getCurrentCUDAStream()));
#else
  no_cuda(kInputOnCuda);
#endif
}

void run_backward(const BackwardArgs& args, const at::Tensor& x) {
  if (x.is_cpu()) return cpu::backward(args);
#ifdef BNK_WITH_CUDA
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Plan plan = plan_for(args.problem, pass_of(args), args.behind_relu(), args.x);
  const at::Tensor scratch = scratch_like(x, cuda::scratch_bytes(plan, pass_of(args)));
  C10_CUDA_CHECK(cuda::backward(args, plan, scratch.data_ptr(), counters_of(plan, stream), stream));
#else
  no_cuda(kInputOnCuda);
#endif
}

void run_statistics(const StatisticsArgs& args, const at::Tensor& beside) {
  if (beside.is_cpu()) return cpu::statistics(args);
#ifdef BNK_WITH_CUDA
  const c10::cuda::CUDAGuard guard(beside.device());
  const StreamingPlan plan = streaming_plan_for(args.problem, args.x);
  const at::Tensor scratch = scratch_like(beside, cuda::sync::statistics_scratch(plan));
  C10_CUDA_CHECK(cuda::sync::statistics(args, plan, scratch.data_ptr(), c10::cuda::getCurrentCUDAStream()));
#else
  no_cuda(kInputOnCuda);
#endif
}

void run_join_statistics(const JoinStatisticsArgs& args, const at::Tensor& beside) {
  if (beside.is_cpu()) return cpu::join_statistics(args);
#ifdef BNK_WITH_CUDA
  const c10::cuda::CUDAGuard guard(beside.device());
  C10_CUDA_CHECK(cuda::sync::join_statistics(args, c10::cuda::getCurrentCUDAStream()));
#else
  no_cuda(kInputOnCuda);
#endif
}

void run_normalize(const NormalizeArgs& args, const at::Tensor& beside) {
  if (beside.is_cpu()) return cpu::normalize(args);
#ifdef BNK_WITH_CUDA
  const c10::cuda::CUDAGuard guard(beside.device());
  const StreamingPlan plan = streaming_plan_for(args.problem, args.x);
  C10_CUDA_CHECK(cuda::sync::normalize(args, plan, c10::cuda::getCurrentCUDAStream()));
#else
  no_cuda(kInputOnCuda);
#endif
}

void run_grad_sums(const GradSumsArgs& args, const at::Tensor& beside) {
  if (beside.is_cpu()) return cpu::grad_sums(args);
#ifdef BNK_WITH_CUDA
  const c10::cuda::CUDAGuard guard(beside.device());
  const StreamingPlan plan = streaming_plan_for(args.problem, args.x);
  const at::Tensor scratch = scratch_like(beside, cuda::sync::grad_sums_scratch(plan));
  C10_CUDA_CHECK(cuda::sync::grad_sums(args, plan, scratch.data_ptr(), c10::cuda::getCurrentCUDAStream()));
#else
  no_cuda(kInputOnCuda);
#endif
}

void run_grad_input(const GradInputArgs& args, const at::Tensor& beside) {
  if (beside.is_cpu()) return cpu::grad_input(args);
#ifdef BNK_WITH_CUDA
  const c10::cuda::CUDAGuard guard(beside.device());
  const StreamingPlan plan = streaming_plan_for(args.problem, args.x);
  const at::Tensor scratch = scratch_like(beside, cuda::sync::grad_input_scratch(plan));
  C10_CUDA_CHECK(cuda::sync::grad_input(args, plan, scratch.data_ptr(), c10::cuda::getCurrentCUDAStream()));
#else
  no_cuda(kInputOnCuda);
#endif
}

DeviceLimits device_limits(int device) {
#ifdef BNK_WITH_CUDA
  const int count = c10::cuda::device_count();
  TORCH_CHECK(device >= 0 && device < count, "expected a CUDA device below ", count, ", but got ", device,
              count == 0 ? ": this machine has none that torch can use" : "");
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  DeviceLimits limits;
  C10_CUDA_CHECK(cuda::current_device_limits(&limits));
  return limits;
#else
  (void)device;
  no_cuda("the limits of a CUDA device were asked for");
#endif
}

}  // namespace bnk
