#include "dispatch.h"

#include <c10/util/Exception.h>

#include "../cpu/backend.h"

#ifdef BNK_WITH_CUDA
#include <ATen/ops/from_blob.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdlib>
#include <exception>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../cuda/backend.h"
#include "../cuda/launch/barrier_workspace.h"
#endif

namespace bnk {

#ifdef BNK_WITH_CUDA
namespace {

// BNKERNELS_PLAN=two_pass takes the two-pass path for everything; read once.
PlanOptions plan_options() {
  static const PlanOptions options = [] {
    const char* value = std::getenv("BNKERNELS_PLAN");
    const std::string text = value == nullptr ? "" : value;
    TORCH_CHECK(text.empty() || text == "auto" || text == "two_pass", "BNKERNELS_PLAN=", text,
                ": expected auto or two_pass");
    return PlanOptions{.force_two_pass = text == "two_pass"};
  }();
  return options;
}

// A stream of the current device that is never captured. torch's own streams may be capturing.
cudaStream_t stream_for_allocations() {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, cudaStream_t> streams;
  const std::lock_guard<std::mutex> lock(mutex);
  cudaStream_t& stream = streams[c10::cuda::current_device()];
  if (stream == nullptr) C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return stream;
}

// Memory from torch's caching allocator, which frees its cached blocks when the device is out of memory.
class TorchHost final : public cuda::Host {
 public:
  // Allocated on the current stream, so that the memory is reused without a synchronization.
  void* scratch(int64_t bytes) override {
    if (bytes == 0) return nullptr;
    cached_.push_back(c10::cuda::CUDACachingAllocator::get()->allocate(static_cast<size_t>(bytes)));
    return cached_.back().get();
  }

  // Allocated on a separate stream and thread. The allocator takes memory from a graph's or a user's pool while the
  // current stream captures, or while the calling thread allocates to that pool (torch.cuda.use_mem_pool, warm-ups of
  // torch.compile's CUDA graphs); this memory outlives both. Relaxed capture mode allows a thread to make calls that a
  // capture otherwise forbids.
  void* zeros(int64_t bytes) override {
    void* memory = nullptr;
    std::exception_ptr error;
    std::thread([&, device = c10::cuda::current_device()] {
      try {
        const c10::cuda::CUDAGuard guard(device);
        const c10::cuda::CUDAStreamCaptureModeGuard mode(cudaStreamCaptureModeRelaxed);
        const cudaStream_t stream = stream_for_allocations();
        memory = c10::cuda::CUDACachingAllocator::raw_alloc_with_stream(static_cast<size_t>(bytes), stream);
        C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), stream));
        C10_CUDA_CHECK(cudaStreamSynchronize(stream));
      } catch (...) {
        error = std::current_exception();
        if (memory != nullptr) c10::cuda::CUDACachingAllocator::raw_delete(memory);
      }
    }).join();
    if (error) std::rethrow_exception(error);
    return memory;
  }

  void warn(const std::string& message) override { TORCH_WARN(message); }

 private:
  std::vector<c10::DataPtr> cached_;
};

template <typename Call>
void run_on_cuda(const at::Tensor& x, const Call& call) {
  const c10::cuda::CUDAGuard guard(x.device());
  TorchHost host;
  C10_CUDA_CHECK(call(cuda::Context{c10::cuda::getCurrentCUDAStream(), plan_options(), host}));
}

}  // namespace

#define BNK_RUN(Args, function)                                                                  \
  void run(const Args& args, const at::Tensor& x) {                                              \
    if (x.is_cpu()) return cpu::function(args);                                                  \
    run_on_cuda(x, [&](const cuda::Context& context) { return cuda::function(args, context); }); \
  }

#else
namespace {

[[noreturn]] void no_cuda(const char* wanted) {
  TORCH_CHECK(
      false, "bnkernels was built for the CPU only, but ", wanted,
      ". Rebuild it with a CUDA build of torch and with nvcc on PATH (set FORCE_CUDA=1 to get an error if the build "
      "would leave CUDA out)");
}

}  // namespace

#define BNK_RUN(Args, function)                     \
  void run(const Args& args, const at::Tensor& x) { \
    if (x.is_cpu()) return cpu::function(args);     \
    no_cuda("the input is on a CUDA device");       \
  }

#endif

BNK_RUN(ForwardTrainArgs, forward_train)
BNK_RUN(ForwardEvalArgs, forward_eval)
BNK_RUN(BackwardArgs, backward)
BNK_RUN(StatisticsArgs, statistics)
BNK_RUN(CombineStatisticsArgs, combine_statistics)
BNK_RUN(NormalizeArgs, normalize)
BNK_RUN(GradSumsArgs, grad_sums)
BNK_RUN(GradInputArgs, grad_input)

#undef BNK_RUN

DeviceLimits device_limits(int device) {
#ifdef BNK_WITH_CUDA
  const int count = c10::cuda::device_count();
  TORCH_CHECK(device >= 0 && device < count, "expected a CUDA device below ", count, ", but got ", device,
              count == 0 ? ": torch finds no CUDA device on this machine" : "");
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  DeviceLimits limits;
  C10_CUDA_CHECK(cuda::current_device_limits(&limits));
  return limits;
#else
  (void)device;
  no_cuda("the limits of a CUDA device were asked for");
#endif
}

std::vector<at::Tensor> barrier_workspace(int device) {
#ifdef BNK_WITH_CUDA
  std::vector<at::Tensor> all;
  const auto options = at::TensorOptions(at::kInt).device(at::kCUDA, static_cast<c10::DeviceIndex>(device));
  constexpr int64_t kInts = kBarrierWordBytes / static_cast<int64_t>(sizeof(int));
  for (const auto& [memory, count] : cuda::barrier_workspaces(device)) {
    all.push_back(at::from_blob(memory, {count, kBarrierWords, kInts}, options).select(2, 0));
  }
  return all;
#else
  (void)device;
  no_cuda("the barrier workspace of a CUDA device was asked for");
#endif
}

}  // namespace bnk
