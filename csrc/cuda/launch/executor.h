// Executors: run a launch sequence (persistent.h, two_pass.h, sync.h). StreamExecutor launches on a CUDA stream; the
// others launch nothing and query the kernel that would be launched.
#pragma once

#include <cuda_runtime_api.h>

#include <mutex>
#include <set>
#include <utility>

#include "../../plan/plan.h"

namespace bnk::cuda {

// Opts a kernel in to more than 48 KB of dynamic shared memory, once per kernel and device.
inline cudaError_t allow_dynamic_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (allowed.count({kernel, device}) != 0) return cudaSuccess;
  }
  cudaFuncAttributes attributes;
  if ((error = cudaFuncGetAttributes(&attributes, kernel)) != cudaSuccess) return error;
  int limit = 0;
  if ((error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) != cudaSuccess) {
    return error;
  }
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               limit - static_cast<int>(attributes.sharedSizeBytes));
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  allowed.insert({kernel, device});
  return cudaSuccess;
}

class LaunchConfig {
 public:
  LaunchConfig(Launch launch, cudaStream_t stream) {
    config_.gridDim = dim3(static_cast<unsigned>(launch.grid));
    config_.blockDim = dim3(static_cast<unsigned>(launch.block));
    config_.stream = stream;
  }
  LaunchConfig(const PersistentPlan& plan, cudaStream_t stream) : LaunchConfig(plan.launch, stream) {
    config_.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
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
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attribute_{};
};

class StreamExecutor {
 public:
  explicit StreamExecutor(cudaStream_t stream) : stream_(stream) {}

  // After an error no further kernel is launched: it would read data that was never written.
  template <typename Params>
  void launch(Launch launch, void (*kernel)(Params), const Params& params) {
    if (error_ == cudaSuccess) error_ = cudaLaunchKernelEx(LaunchConfig(launch, stream_).get(), kernel, params);
  }
  template <typename Params>
  void launch(const PersistentPlan& plan, void (*kernel)(Params), const Params& params) {
    error_ = allow_dynamic_shared_memory(reinterpret_cast<const void*>(kernel));
    if (error_ == cudaSuccess) error_ = cudaLaunchKernelEx(LaunchConfig(plan, stream_).get(), kernel, params);
  }

  cudaError_t error() const { return error_; }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

// Clusters require sm_90. A build for an older GPU runs on a newer one through its PTX, compiled without the cluster
// instructions: launched as a cluster, each CTA would take its own sums for the sums of the group.
inline constexpr int kFirstArchWithClusters = 90;

// Whether a kernel holds code for clusters: both its PTX and its machine code were compiled for sm_90 or newer.
struct ClusterCodeExecutor {
  template <typename Params>
  void launch(const PersistentPlan&, void (*kernel)(Params), const Params&) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
    has_code = error == cudaSuccess && attributes.ptxVersion >= kFirstArchWithClusters &&
               attributes.binaryVersion >= kFirstArchWithClusters;
  }

  cudaError_t error = cudaSuccess;
  bool has_code = false;
};

// Groups of a plan's kernel that the current device can hold at once; 0 if it cannot launch such groups.
struct OccupancyExecutor {
  template <typename Params>
  void launch(const PersistentPlan& plan, void (*kernel)(Params), const Params& params) {
    if ((error = allow_dynamic_shared_memory(reinterpret_cast<const void*>(kernel))) != cudaSuccess) return;
    if (plan.group == GroupKind::kCluster) {
      ClusterCodeExecutor cluster;
      cluster.launch(plan, kernel, params);
      if ((error = cluster.error) != cudaSuccess || !cluster.has_code) return;
      error = cudaOccupancyMaxActiveClusters(&groups, kernel, LaunchConfig(plan, nullptr).get());
      if (error == cudaErrorInvalidClusterSize) {
        (void)cudaGetLastError();  // not a failure: no such cluster fits
        error = cudaSuccess;
        groups = 0;
      }
      return;
    }
    int device = 0, multiprocessors = 0, blocks = 0;
    if ((error = cudaGetDevice(&device)) != cudaSuccess) return;
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, plan.launch.block,
                                                          static_cast<size_t>(plan.shared_bytes));
    groups = blocks * multiprocessors / plan.group_size;
  }

  cudaError_t error = cudaSuccess;
  int groups = 0;
};

}  // namespace bnk::cuda
