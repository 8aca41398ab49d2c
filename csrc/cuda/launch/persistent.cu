// Launches of the persistent kernel. Its kernels are compiled in persistent_*.cu.
#include <mutex>
#include <set>
#include <utility>

#include "launchers.h"
#include "persistent.h"

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

// How a plan's kernel is launched.
class Configuration {
 public:
  Configuration(const PersistentPlan& plan, cudaStream_t stream) {
    config_.gridDim = dim3(static_cast<unsigned>(plan.launch.grid));
    config_.blockDim = dim3(static_cast<unsigned>(plan.launch.block));
    config_.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
    config_.stream = stream;
    config_.attrs = &attribute_;
    config_.numAttrs = plan.group == GroupKind::kCta ? 0 : 1;
    // Blocks that wait for each other must run at the same time.
    if (plan.group == GroupKind::kCluster) {
      attribute_.id = cudaLaunchAttributeClusterDimension;
      attribute_.val.clusterDim = {static_cast<unsigned>(plan.group_size), 1, 1};
    } else {
      attribute_.id = cudaLaunchAttributeCooperative;
      attribute_.val.cooperative = 1;
    }
  }
  Configuration(const Configuration&) = delete;
  Configuration& operator=(const Configuration&) = delete;

  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attribute_{};
};

class StreamExecutor {
 public:
  explicit StreamExecutor(cudaStream_t stream) : stream_(stream) {}

  template <typename Params>
  void launch(const PersistentPlan& plan, void (*kernel)(Params), const Params& params) {
    error_ = prepare(reinterpret_cast<const void*>(kernel));
    if (error_ != cudaSuccess) return;
    error_ = cudaLaunchKernelEx(Configuration(plan, stream_).get(), kernel, params);
  }

  cudaError_t error() const { return error_; }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

// Clusters came with sm_90. A build for an older GPU runs on a newer one by its PTX, whose kernels are compiled without
// the cluster instructions: launched as a cluster, each block would take its own sums for those of all.
constexpr int kFirstArchWithClusters = 90;

cudaError_t has_cluster_code_in(const void* kernel, bool* has) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) {
    *has = attributes.ptxVersion >= kFirstArchWithClusters && attributes.binaryVersion >= kFirstArchWithClusters;
  }
  return error;
}

// Launches nothing: queries whether the kernel has code for clusters.
class ClusterCodeExecutor {
 public:
  template <typename Params>
  void launch(const PersistentPlan&, void (*kernel)(Params), const Params&) {
    error = has_cluster_code_in(reinterpret_cast<const void*>(kernel), &has);
  }

  cudaError_t error = cudaSuccess;
  bool has = false;
};

// Launches nothing: queries how many groups fit.
class OccupancyExecutor {
 public:
  template <typename Params>
  void launch(const PersistentPlan& plan, void (*kernel)(Params), const Params&) {
    if ((error = prepare(reinterpret_cast<const void*>(kernel))) != cudaSuccess) return;
    if (plan.group == GroupKind::kCluster) {
      bool has_clusters = false;
      error = has_cluster_code_in(reinterpret_cast<const void*>(kernel), &has_clusters);
      if (error != cudaSuccess || !has_clusters) return;
      error = cudaOccupancyMaxActiveClusters(&groups, kernel, Configuration(plan, nullptr).get());
      if (error == cudaErrorInvalidClusterSize) {
        (void)cudaGetLastError();  // an answer: no such cluster fits
        error = cudaSuccess;
        groups = 0;
      }
      return;
    }
    int device = 0, multiprocessors = 0, beside = 0;
    if ((error = cudaGetDevice(&device)) != cudaSuccess) return;
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&beside, kernel, plan.launch.block,
                                                          static_cast<size_t>(plan.shared_bytes));
    groups = beside * multiprocessors / plan.group_size;
  }

  cudaError_t error = cudaSuccess;
  int groups = 0;
};

}  // namespace

namespace persistent_path {

int64_t scratch_bytes(const PersistentPlan& plan, Pass pass) {
  const int64_t doubles =
      pass == Pass::kForwardTrain ? persistent::forward_scratch(plan) : persistent::backward_scratch(plan);
  return doubles * static_cast<int64_t>(sizeof(double));
}

bool needs_barrier_workspace(const PersistentPlan& plan, bool cumulative) {
  return persistent::needs_barrier_workspace(plan, cumulative);
}

cudaError_t has_cluster_code(bool* has) {
  ClusterCodeExecutor executor;
  persistent::forward_train({}, {}, nullptr, nullptr, executor);
  *has = executor.has;
  return executor.error;
}

cudaError_t groups_at_once(Dtype dtype, Pass pass, bool has_epilogue, const PersistentPlan& plan, int* groups) {
  OccupancyExecutor executor;
  if (pass == Pass::kForwardTrain) {
    ForwardTrainArgs args{};
    args.problem.dtype = dtype;
    args.epilogue.relu = has_epilogue;
    persistent::forward_train(args, plan, nullptr, nullptr, executor);
  } else {
    BackwardArgs args{};
    args.problem.dtype = dtype;
    if (has_epilogue) args.relu_low.data = &args;  // not looked at
    persistent::backward(args, plan, nullptr, nullptr, executor);
  }
  *groups = executor.groups;
  return executor.error;
}

cudaError_t forward_train(const ForwardTrainArgs& args, const PersistentPlan& plan, void* scratch,
                          void* barrier_workspace, cudaStream_t stream) {
  StreamExecutor executor(stream);
  persistent::forward_train(args, plan, static_cast<double*>(scratch), barrier_workspace, executor);
  return executor.error();
}

cudaError_t backward(const BackwardArgs& args, const PersistentPlan& plan, void* scratch, void* barrier_workspace,
                     cudaStream_t stream) {
  StreamExecutor executor(stream);
  persistent::backward(args, plan, static_cast<double*>(scratch), barrier_workspace, executor);
  return executor.error();
}

}  // namespace persistent_path
}  // namespace bnk::cuda
