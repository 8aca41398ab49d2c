#include "backend.h"

#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "counters.h"
#include "launchers.h"

namespace bnk::cuda {
namespace {

// Blocks of a cluster that every device with clusters takes (CUDA C++ Programming Guide, "Thread Block Clusters").
constexpr int kPortableCluster = 8;

cudaError_t ask_limits(int device, DeviceLimits* limits) {
  int shared_per_multiprocessor = 0, shared_per_block = 0, shared_reserved = 0, cooperative = 0, clusters = 0;
  const std::pair<cudaDeviceAttr, int*> questions[] = {
      {cudaDevAttrMultiProcessorCount, &limits->multiprocessors},
      {cudaDevAttrMaxThreadsPerMultiProcessor, &limits->max_threads_per_multiprocessor},
      {cudaDevAttrMaxBlocksPerMultiprocessor, &limits->max_blocks_per_multiprocessor},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &shared_per_multiprocessor},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_per_block},
      {cudaDevAttrReservedSharedMemoryPerBlock, &shared_reserved},
      {cudaDevAttrCooperativeLaunch, &cooperative},
      {cudaDevAttrClusterLaunch, &clusters},
  };
  for (const auto& [attribute, answer] : questions) {
    const cudaError_t error = cudaDeviceGetAttribute(answer, attribute, device);
    if (error != cudaSuccess) return error;
  }
  limits->shared_per_multiprocessor = shared_per_multiprocessor;
  limits->shared_per_block = shared_per_block;
  limits->shared_reserved = shared_reserved;
  limits->cooperative_launch = cooperative != 0;
  limits->max_cluster = clusters != 0 ? kPortableCluster : 0;
  return cudaSuccess;
}

}  // namespace

cudaError_t current_device_limits(DeviceLimits* limits) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(device); found != known.end()) {
    *limits = found->second;
    return cudaSuccess;
  }
  if ((error = ask_limits(device, limits)) == cudaSuccess) known[device] = *limits;
  return error;
}

cudaError_t confirm(Dtype dtype, Pass pass, bool fused, Plan* plan) {
  ResidentPlan& resident = plan->resident;
  if (plan->path != Path::kResident || resident.group == Group::kBlock) return cudaSuccess;
  // By device, kernel and what of the plan decides it.
  using Key = std::tuple<int, Dtype, Pass, bool, Layout, Group, int, int, int64_t>;
  static std::mutex mutex;
  static std::map<Key, int> known;  // groups at the same time on the device
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const Key key{device,
                dtype,
                pass,
                fused,
                resident.walk.layout,
                resident.group,
                resident.members,
                resident.launch.block,
                resident.shared_bytes};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, unknown] = known.try_emplace(key, 0);
  if (unknown && (error = resident_path::groups_at_once(dtype, pass, fused, resident, &entry->second)) != cudaSuccess) {
    known.erase(entry);
    return error;
  }
  const int fit = entry->second;
  if (fit >= resident.groups) return cudaSuccess;
  if (resident.group == Group::kCluster && fit > 0) {
    resident.groups = fit;
    resident.launch.grid = int64_t{fit} * resident.members;
  } else {
    plan->path = Path::kStreaming;
    plan->reason = Reason::kNotResident;
  }
  return cudaSuccess;
}

int64_t scratch_bytes(const Plan& plan, Pass pass) {
  return plan.path == Path::kResident ? resident_path::scratch_bytes(plan.resident, pass)
                                      : streaming_path::scratch_bytes(plan.streaming, pass);
}

cudaError_t counters_for(const Plan& plan, cudaStream_t stream, unsigned** counters) {
  *counters = nullptr;
  if (plan.path != Path::kResident) return cudaSuccess;
  return lease_counters(resident_path::counters(plan.resident), stream, counters);
}

cudaError_t forward_train(const ForwardTrainArgs& args, const Plan& plan, void* scratch, unsigned* counters,
                          cudaStream_t stream) {
  if (plan.path == Path::kStreaming) return streaming_path::forward_train(args, plan.streaming, scratch, stream);
  return resident_path::forward_train(args, plan.resident, scratch, counters, stream);
}

cudaError_t forward_eval(const ForwardEvalArgs& args, const Plan& plan, cudaStream_t stream) {
  return streaming_path::forward_eval(args, plan.streaming, stream);
}

cudaError_t backward(const BackwardArgs& args, const Plan& plan, void* scratch, unsigned* counters,
                     cudaStream_t stream) {
  if (plan.path == Path::kStreaming) return streaming_path::backward(args, plan.streaming, scratch, stream);
  return resident_path::backward(args, plan.resident, scratch, counters, stream);
}

}  // namespace bnk::cuda
