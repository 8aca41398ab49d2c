// Launches of the resident path.
#include <mutex>
#include <set>
#include <utility>

#include "../paths/resident.h"
#include "launchers.h"

namespace bnk::cuda {
namespace {

// A kernel may use more than 48 KB of dynamic shared memory on a device once it was told so there.
cudaError_t prepare(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> prepared;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (prepared.count({kernel, device}) != 0) return cudaSuccess;
  cudaFuncAttributes attributes;
  if ((error = cudaFuncGetAttributes(&attributes, kernel)) != cudaSuccess) return error;
  int most = 0;
  if ((error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) != cudaSuccess) {
    return error;
  }
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               most - static_cast<int>(attributes.sharedSizeBytes));
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) prepared.insert({kernel, device});
  return error;
}

class StreamExecutor {
 public:
  explicit StreamExecutor(cudaStream_t stream) : stream_(stream) {}

  // Blocks that wait for each other must run at the same time, which is what a cooperative launch is for.
  template <typename Params>
  void launch(const ResidentPlan& plan, void (*kernel)(Params), const Params& params) {
    error_ = prepare(reinterpret_cast<const void*>(kernel));
    if (error_ != cudaSuccess) return;
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(plan.launch.grid));
    config.blockDim = dim3(static_cast<unsigned>(plan.launch.block));
    config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
    config.stream = stream_;
    config.attrs = &cooperative;
    config.numAttrs = plan.members > 1 ? 1 : 0;
    error_ = cudaLaunchKernelEx(&config, kernel, params);
  }

  cudaError_t error() const { return error_; }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

// Launches nothing: asks how many blocks fit.
class OccupancyExecutor {
 public:
  template <typename Params>
  void launch(const ResidentPlan& plan, void (*kernel)(Params), const Params&) {
    error = prepare(reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, plan.launch.block,
                                                          static_cast<size_t>(plan.shared_bytes));
  }

  cudaError_t error = cudaSuccess;
  int blocks = 0;
};

}  // namespace

namespace resident_path {

int64_t scratch_bytes(const ResidentPlan& plan, Pass pass) {
  const int64_t doubles =
      pass == Pass::kForwardTrain ? resident::forward_scratch(plan) : resident::backward_scratch(plan);
  return doubles * static_cast<int64_t>(sizeof(double));
}

int64_t counters(const ResidentPlan& plan) { return resident::counters(plan); }

cudaError_t blocks_beside(Dtype dtype, Pass pass, const ResidentPlan& plan, int* blocks) {
  OccupancyExecutor executor;
  if (pass == Pass::kForwardTrain) {
    ForwardTrainArgs args{};
    args.problem.dtype = dtype;
    resident::forward_train(args, plan, nullptr, nullptr, executor);
  } else {
    BackwardArgs args{};
    args.problem.dtype = dtype;
    resident::backward(args, plan, nullptr, nullptr, executor);
  }
  *blocks = executor.blocks;
  return executor.error;
}

cudaError_t forward_train(const ForwardTrainArgs& args, const ResidentPlan& plan, void* scratch, unsigned* counters,
                          cudaStream_t stream) {
  StreamExecutor executor(stream);
  resident::forward_train(args, plan, static_cast<double*>(scratch), counters, executor);
  return executor.error();
}

cudaError_t backward(const BackwardArgs& args, const ResidentPlan& plan, void* scratch, unsigned* counters,
                     cudaStream_t stream) {
  StreamExecutor executor(stream);
  resident::backward(args, plan, static_cast<double*>(scratch), counters, executor);
  return executor.error();
}

}  // namespace resident_path
}  // namespace bnk::cuda
