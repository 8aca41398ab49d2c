#include "backend.h"

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "barrier_workspace.h"
#include "launchers.h"

namespace bnk::cuda {
namespace {

// Blocks of a cluster that every device with clusters takes (CUDA C++ Programming Guide, "Thread Block Clusters").
constexpr int kPortableCluster = 8;

cudaError_t query_limits(int device, DeviceLimits* limits) {
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
  bool has_cluster_code = false;
  const cudaError_t error = resident_path::has_cluster_code(&has_cluster_code);
  if (error != cudaSuccess) return error;
  limits->shared_per_multiprocessor = shared_per_multiprocessor;
  limits->shared_per_block = shared_per_block;
  limits->shared_reserved = shared_reserved;
  limits->cooperative_launch = cooperative != 0;
  limits->max_cluster = clusters != 0 && has_cluster_code ? kPortableCluster : 0;
  return cudaSuccess;
}

// A persistent kernel on a device, and what of a plan decides how many of its groups run at a time.
using KernelKey = std::tuple<int, Dtype, Pass, bool, Layout, Group, int, int, int64_t>;

// Groups that run at a time, by kernel and plan. Queried once; 0 from the moment that a launch is refused.
class Occupancy {
 public:
  cudaError_t groups(const KernelKey& key, Dtype dtype, Pass pass, bool fused, const ResidentPlan& plan, int* groups) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = groups_.find(key);
    if (found == groups_.end()) {
      // Blocks alone wait for no other, however many run at a time.
      int fit = std::numeric_limits<int>::max();
      if (plan.group != Group::kBlock) {
        const cudaError_t error = resident_path::groups_at_once(dtype, pass, fused, plan, &fit);
        if (error != cudaSuccess) return error;
      }
      found = groups_.emplace(key, fit).first;
    }
    *groups = found->second;
    return cudaSuccess;
  }

  void refuse(const KernelKey& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    groups_[key] = 0;
  }

 private:
  std::mutex mutex_;
  std::map<KernelKey, int> groups_;
};

Occupancy& occupancy() {
  static Occupancy& all = *new Occupancy;
  return all;
}

// Whether the runtime refused a launch that the current context cannot hold at once: fewer multiprocessors than the
// device has (green contexts, MPS), or kernels that a tool has instrumented. Nothing has run, and the context is intact.
bool is_refusal(cudaError_t error) {
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorInvalidClusterSize ||
         error == cudaErrorLaunchOutOfResources;
}

// Plans the pass and runs it: by persistent(plan, scratch, barrier_workspace) where the device holds the plan's groups at
// a time, else by two_pass(plan, scratch). fused: with an epilogue, or after a ReLU.
template <typename Persistent, typename TwoPass>
cudaError_t run(const Problem& problem, Pass pass, bool fused, bool cumulative, const void* lead,
                const PlanOptions& options, cudaStream_t stream, Host& host, const Persistent& persistent,
                const TwoPass& two_pass) {
  DeviceLimits limits;
  int device = 0;
  cudaError_t error = current_device_limits(&limits);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  Plan plan = plan_pass(problem, pass, is_aligned(lead), limits, options);
  if (plan.path == Path::kResident) {
    ResidentPlan& resident = plan.resident;
    const KernelKey key{device,
                        problem.dtype,
                        pass,
                        fused,
                        resident.walk.layout,
                        resident.group,
                        resident.members,
                        resident.launch.block,
                        resident.shared_bytes};
    int fit = 0;
    if ((error = occupancy().groups(key, problem.dtype, pass, fused, resident, &fit)) != cudaSuccess) return error;
    // Clusters may take turns. The groups of a cooperative launch may not.
    if (resident.group == Group::kCluster && fit > 0 && fit < resident.groups) {
      resident.groups = fit;
      resident.launch.grid = int64_t{fit} * resident.members;
    }
    if (fit >= resident.groups) {
      void* barrier_workspace = nullptr;
      if (resident_path::needs_barrier_workspace(resident, cumulative)) {
        error = barrier_workspace_for(stream, host, &barrier_workspace);
        if (error != cudaSuccess) return error;
      }
      error = persistent(resident, host.scratch(resident_path::scratch_bytes(resident, pass)), barrier_workspace);
      if (!is_refusal(error)) return error;
      (void)cudaGetLastError();  // clears it: nothing has gone wrong that the caller should find
      occupancy().refuse(key);
      host.warn(std::string("bnkernels: CUDA refused to launch a kernel of ") + std::to_string(resident.launch.grid) +
                " blocks (" + cudaGetErrorName(error) +
                "). Layers of this kind run as several launches in this process: the same results, but more memory "
                "traffic. Expected where a green context, MPS or a tool limits the multiprocessors or registers.");
    }
  }
  return two_pass(plan.streaming, host.scratch(streaming_path::scratch_bytes(plan.streaming, pass)));
}

// Backward without grad_x, or of inference, has no result that waits for the sums: nothing is to be kept.
Pass pass_of(const BackwardArgs& args) {
  return args.training && args.grad_x != nullptr ? Pass::kBackwardTrain : Pass::kBackwardEval;
}

cudaError_t streaming_plan_for(const Problem& problem, const void* lead, StreamingPlan* plan) {
  DeviceLimits limits;
  const cudaError_t error = current_device_limits(&limits);
  if (error == cudaSuccess) *plan = plan_streaming(problem, is_aligned(lead), limits);
  return error;
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
  if ((error = query_limits(device, limits)) == cudaSuccess) known[device] = *limits;
  return error;
}

cudaError_t forward_train(const ForwardTrainArgs& args, const PlanOptions& options, cudaStream_t stream, Host& host) {
  return run(
      args.problem, Pass::kForwardTrain, args.epilogue.is_there(), args.cumulative, args.x, options, stream, host,
      [&](const ResidentPlan& plan, void* scratch, void* barrier_workspace) {
        return resident_path::forward_train(args, plan, scratch, barrier_workspace, stream);
      },
      [&](const StreamingPlan& plan, void* scratch) {
        return streaming_path::forward_train(args, plan, scratch, stream);
      });
}

cudaError_t forward_eval(const ForwardEvalArgs& args, cudaStream_t stream) {
  StreamingPlan plan;
  const cudaError_t error = streaming_plan_for(args.problem, args.x, &plan);
  return error != cudaSuccess ? error : streaming_path::forward_eval(args, plan, stream);
}

cudaError_t backward(const BackwardArgs& args, const PlanOptions& options, cudaStream_t stream, Host& host) {
  return run(
      args.problem, pass_of(args), args.behind_relu(), false, args.x, options, stream, host,
      [&](const ResidentPlan& plan, void* scratch, void* barrier_workspace) {
        return resident_path::backward(args, plan, scratch, barrier_workspace, stream);
      },
      [&](const StreamingPlan& plan, void* scratch) { return streaming_path::backward(args, plan, scratch, stream); });
}

namespace sync {

cudaError_t statistics(const StatisticsArgs& args, cudaStream_t stream, Host& host) {
  StreamingPlan plan;
  const cudaError_t error = streaming_plan_for(args.problem, args.x, &plan);
  if (error != cudaSuccess) return error;
  return statistics(args, plan, host.scratch(statistics_scratch(plan)), stream);
}

cudaError_t normalize(const NormalizeArgs& args, cudaStream_t stream) {
  StreamingPlan plan;
  const cudaError_t error = streaming_plan_for(args.problem, args.x, &plan);
  return error != cudaSuccess ? error : normalize(args, plan, stream);
}

cudaError_t grad_sums(const GradSumsArgs& args, cudaStream_t stream, Host& host) {
  StreamingPlan plan;
  const cudaError_t error = streaming_plan_for(args.problem, args.x, &plan);
  if (error != cudaSuccess) return error;
  return grad_sums(args, plan, host.scratch(grad_sums_scratch(plan)), stream);
}

cudaError_t grad_input(const GradInputArgs& args, cudaStream_t stream, Host& host) {
  StreamingPlan plan;
  const cudaError_t error = streaming_plan_for(args.problem, args.x, &plan);
  if (error != cudaSuccess) return error;
  return grad_input(args, plan, host.scratch(grad_input_scratch(plan)), stream);
}

}  // namespace sync
}  // namespace bnk::cuda
