#include "backend.h"

#include <c10/util/Exception.h>

#include "cpu/backend.h"

#ifdef BNK_WITH_CUDA
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/backend.h"
#endif

namespace bnk {

#ifdef BNK_WITH_CUDA
namespace {

StreamingPlan plan_for(const Problem& problem, const void* lead) {
  DeviceLimits limits;
  C10_CUDA_CHECK(cuda::current_device_limits(&limits));
  return plan_streaming(problem, cuda::is_aligned(lead), limits);
}

// From the caching allocator, on the current stream: reused without a synchronization.
at::Tensor scratch_like(const at::Tensor& x, int64_t bytes) { return at::empty({bytes}, x.options().dtype(at::kByte)); }

}  // namespace
#else
namespace {

[[noreturn]] void no_cuda() {
  TORCH_CHECK(
      false,
      "bnkernels was built for the CPU only, but the input is on a CUDA device. Build it again where "
      "torch.version.cuda is set and nvcc is on PATH (FORCE_CUDA=1 makes a build fail that would leave CUDA out)");
}

}  // namespace
#endif

void run_forward_train(const ForwardTrainArgs& args, const at::Tensor& x) {
  if (x.is_cpu()) return cpu::forward_train(args);
#ifdef BNK_WITH_CUDA
  const c10::cuda::CUDAGuard guard(x.device());
  const StreamingPlan plan = plan_for(args.problem, args.x);
  const at::Tensor scratch = scratch_like(x, cuda::forward_train_scratch_bytes(plan));
  C10_CUDA_CHECK(cuda::forward_train(args, plan, scratch.data_ptr(), c10::cuda::getCurrentCUDAStream()));
#else
  no_cuda();
#endif
}

void run_forward_eval(const ForwardEvalArgs& args, const at::Tensor& x) {
  if (x.is_cpu()) return cpu::forward_eval(args);
#ifdef BNK_WITH_CUDA
  const c10::cuda::CUDAGuard guard(x.device());
  C10_CUDA_CHECK(cuda::forward_eval(args, plan_for(args.problem, args.x), c10::cuda::getCurrentCUDAStream()));
#else
  no_cuda();
#endif
}

void run_backward(const BackwardArgs& args, const at::Tensor& x) {
  if (x.is_cpu()) return cpu::backward(args);
#ifdef BNK_WITH_CUDA
  const c10::cuda::CUDAGuard guard(x.device());
  const StreamingPlan plan = plan_for(args.problem, args.x);
  const at::Tensor scratch = scratch_like(x, cuda::backward_scratch_bytes(plan));
  C10_CUDA_CHECK(cuda::backward(args, plan, scratch.data_ptr(), c10::cuda::getCurrentCUDAStream()));
#else
  no_cuda();
#endif
}

}  // namespace bnk
