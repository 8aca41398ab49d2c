#include "backend.h"

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "launch/barrier_workspace.h"
#include "launch/launchers.h"

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
  const cudaError_t error = persistent_path::has_cluster_code(&has_cluster_code);
  if (error != cudaSuccess) return error;
  limits->shared_per_multiprocessor = shared_per_multiprocessor;
  limits->shared_per_block = shared_per_block;
  limits->shared_reserved = shared_reserved;
  limits->cooperative_launch = cooperative != 0;
  limits->max_cluster = clusters != 0 && has_cluster_code ? kPortableCluster : 0;
  return cudaSuccess;
}

// A persistent kernel on a device, and what of a plan decides how many of its groups run at a time.
using KernelKey = std::tuple<int, Dtype, Pass, bool, Layout, GroupKind, int, int, int64_t>;

// Groups that run at a time, by kernel and plan. Queried once; 0 from the moment that a launch is refused.
class Occupancy {
 public:
  cudaError_t groups(const KernelKey& key, Dtype dtype, Pass pass, bool has_epilogue, const PersistentPlan& plan,
                     int* groups) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = groups_.find(key);
    if (found == groups_.end()) {
      // Blocks alone wait for no other, however many run at a time.
      int fit = std::numeric_limits<int>::max();
      if (plan.group != GroupKind::kCta) {
        const cudaError_t error = persistent_path::groups_at_once(dtype, pass, has_epilogue, plan, &fit);
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

// Plans the pass and runs it: by run_persistent(plan, scratch, barrier_workspace) where the device holds the plan's groups at
// a time, else by run_two_pass(plan, scratch). fused: with an epilogue, or after a ReLU.
template <typename Persistent, typename TwoPass>
cudaError_t run(const Problem& problem, Pass pass, bool has_epilogue, bool cumulative, const void* lead,
                const PlanOptions& options, cudaStream_t stream, Host& host, const Persistent& run_persistent,
                const TwoPass& run_two_pass) {
  DeviceLimits limits;
  int device = 0;
  cudaError_t error = current_device_limits(&limits);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  Plan plan = plan_pass(problem, pass, is_aligned(lead), limits, options);
  if (plan.path == Path::kPersistent) {
    PersistentPlan& persistent = plan.persistent;
    const KernelKey key{device,
                        problem.dtype,
                        pass,
                        has_epilogue,
                        persistent.partition.layout,
                        persistent.group,
                        persistent.group_size,
                        persistent.launch.block,
                        persistent.shared_bytes};
    int fit = 0;
    if ((error = occupancy().groups(key, problem.dtype, pass, has_epilogue, persistent, &fit)) != cudaSuccess)
      return error;
    // Clusters may take turns. The groups of a cooperative launch may not.
    if (persistent.group == GroupKind::kCluster && fit > 0 && fit < persistent.groups) {
      persistent.groups = fit;
      persistent.launch.grid = int64_t{fit} * persistent.group_size;
    }
    if (fit >= persistent.groups) {
      void* barrier_workspace = nullptr;
      if (persistent_path::needs_barrier_workspace(persistent, cumulative)) {
        error = barrier_workspace_for(stream, host, &barrier_workspace);
        if (error != cudaSuccess) return error;
      }
      error =
          run_persistent(persistent, host.scratch(persistent_path::scratch_bytes(persistent, pass)), barrier_workspace);
      if (!is_refusal(error)) return error;
      (void)cudaGetLastError();  // clears it: nothing has gone wrong that the caller should find
      occupancy().refuse(key);
      host.warn(std::string("bnkernels: CUDA refused to launch a kernel of ") + std::to_string(persistent.launch.grid) +
                " blocks (" + cudaGetErrorName(error) +
                "). Layers of this kind run as several launches in this process: the same results, but more memory "
                "traffic. Expected where a green context, MPS or a tool limits the multiprocessors or registers.");
    }
  }
  return run_two_pass(plan.two_pass, host.scratch(two_pass_path::scratch_bytes(plan.two_pass, pass)));
}

// Backward without grad_x, or of inference, has no result that waits for the sums: nothing is to be kept.
Pass pass_of(const BackwardArgs& args) {
  return args.training && args.grad_x != nullptr ? Pass::kBackwardTrain : Pass::kBackwardEval;
}

cudaError_t two_pass_plan_for(const Problem& problem, const void* lead, TwoPassPlan* plan) {
  DeviceLimits limits;
  const cudaError_t error = current_device_limits(&limits);
  if (error == cudaSuccess) *plan = plan_two_pass(problem, is_aligned(lead), limits);
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
      args.problem, Pass::kForwardTrain, args.epilogue.enabled(), args.cumulative, args.x, options, stream, host,
      [&](const PersistentPlan& plan, void* scratch, void* barrier_workspace) {
        return persistent_path::forward_train(args, plan, scratch, barrier_workspace, stream);
      },
      [&](const TwoPassPlan& plan, void* scratch) {
        return two_pass_path::forward_train(args, plan, scratch, stream);
      });
}

cudaError_t forward_eval(const ForwardEvalArgs& args, cudaStream_t stream) {
  TwoPassPlan plan;
  const cudaError_t error = two_pass_plan_for(args.problem, args.x, &plan);
  return error != cudaSuccess ? error : two_pass_path::forward_eval(args, plan, stream);
}

cudaError_t backward(const BackwardArgs& args, const PlanOptions& options, cudaStream_t stream, Host& host) {
  return run(
      args.problem, pass_of(args), args.has_relu(), false, args.x, options, stream, host,
      [&](const PersistentPlan& plan, void* scratch, void* barrier_workspace) {
        return persistent_path::backward(args, plan, scratch, barrier_workspace, stream);
      },
      [&](const TwoPassPlan& plan, void* scratch) { return two_pass_path::backward(args, plan, scratch, stream); });
}

namespace sync {

cudaError_t statistics(const StatisticsArgs& args, cudaStream_t stream, Host& host) {
  TwoPassPlan plan;
  const cudaError_t error = two_pass_plan_for(args.problem, args.x, &plan);
  if (error != cudaSuccess) return error;
  return statistics(args, plan, host.scratch(statistics_scratch(plan)), stream);
}

cudaError_t normalize(const NormalizeArgs& args, cudaStream_t stream) {
  TwoPassPlan plan;
  const cudaError_t error = two_pass_plan_for(args.problem, args.x, &plan);
  return error != cudaSuccess ? error : normalize(args, plan, stream);
}

cudaError_t grad_sums(const GradSumsArgs& args, cudaStream_t stream, Host& host) {
  TwoPassPlan plan;
  const cudaError_t error = two_pass_plan_for(args.problem, args.x, &plan);
  if (error != cudaSuccess) return error;
  return grad_sums(args, plan, host.scratch(grad_sums_scratch(plan)), stream);
}

cudaError_t grad_input(const GradInputArgs& args, cudaStream_t stream, Host& host) {
  TwoPassPlan plan;
  const cudaError_t error = two_pass_plan_for(args.problem, args.x, &plan);
  if (error != cudaSuccess) return error;
  return grad_input(args, plan, host.scratch(grad_input_scratch(plan)), stream);
}

}  // namespace sync
}  // namespace bnk::cuda
