#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "backend.h"
#include "launch/barrier_workspace.h"
#include "launch/executor.h"
#include "launch/persistent.h"
#include "launch/sync.h"
#include "launch/two_pass.h"

namespace bnk::cuda {
namespace {

// Largest cluster that every device with clusters supports (CUDA C++ Programming Guide, "Thread Block Clusters").
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
  ClusterCodeExecutor cluster;  // any persistent kernel will do: all are compiled for the same architectures
  persistent::forward_train({}, {}, nullptr, nullptr, cluster);
  if (cluster.error != cudaSuccess) return cluster.error;
  limits->shared_per_multiprocessor = shared_per_multiprocessor;
  limits->shared_per_block = shared_per_block;
  limits->shared_reserved = shared_reserved;
  limits->cooperative_launch = cooperative != 0;
  limits->max_cluster = clusters != 0 && cluster.has_code ? kPortableCluster : 0;
  return cudaSuccess;
}

// A persistent kernel on a device, and the properties of its plan that determine how many groups run at once.
using KernelKey = std::tuple<int, Dtype, Pass, bool, Layout, GroupKind, int, int, int64_t>;

// Groups that run at once, by kernel and plan. Queried once per key, without holding the mutex: a query may load the
// kernel.
class Occupancy {
 public:
  // Query: cudaError_t(int* groups).
  template <typename Query>
  cudaError_t groups(const KernelKey& key, const Query& query, int* groups) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (const auto found = groups_.find(key); found != groups_.end()) {
        *groups = found->second;
        return cudaSuccess;
      }
    }
    const cudaError_t error = query(groups);
    if (error != cudaSuccess) return error;
    const std::lock_guard<std::mutex> lock(mutex_);
    *groups = groups_.emplace(key, *groups).first->second;
    return cudaSuccess;
  }

  // CUDA refused to launch plan.groups groups. Fewer cooperative groups may fit; clusters of this size never will.
  void refuse(const KernelKey& key, const PersistentPlan& plan) {
    const std::lock_guard<std::mutex> lock(mutex_);
    int& groups = groups_[key];
    groups = std::min(groups, plan.group == GroupKind::kGrid ? plan.groups - 1 : 0);
  }

 private:
  std::mutex mutex_;
  std::map<KernelKey, int> groups_;
};

Occupancy& occupancy() {
  static Occupancy& all = *new Occupancy;
  return all;
}

// Whether the runtime refused a launch because the current context cannot hold it at once: fewer multiprocessors than
// the device has (green contexts, MPS), or kernels instrumented by a tool. Nothing has run, and the context is intact.
bool is_refusal(cudaError_t error) {
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorInvalidClusterSize ||
         error == cudaErrorLaunchOutOfResources;
}

int64_t bytes_of(int64_t doubles) { return doubles * static_cast<int64_t>(sizeof(double)); }

// A call that has a persistent kernel, as run() sees it. persistent(plan, scratch, workspace, executor) and
// two_pass(plan, scratch, executor) are its launch sequences.
template <typename Persistent, typename TwoPass>
struct Sequences {
  Pass pass;
  bool has_epilogue;
  bool cumulative;
  Persistent persistent;
  TwoPass two_pass;
};

// Plans the pass and runs it: with the persistent kernel if the device can hold the plan's groups, else in two passes.
template <typename Persistent, typename TwoPass>
cudaError_t run(const Problem& problem, const void* x, const Sequences<Persistent, TwoPass>& call,
                const Context& context) {
  DeviceLimits limits;
  int device = 0;
  cudaError_t error = current_device_limits(&limits);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  Plan plan = plan_pass(problem, call.pass, two_pass::is_aligned(x), limits, context.options);
  StreamExecutor executor(context.stream);
  if (plan.path == Path::kPersistent) {
    PersistentPlan& persistent = plan.persistent;
    const KernelKey key{device,
                        problem.dtype,
                        call.pass,
                        call.has_epilogue,
                        persistent.partition.layout,
                        persistent.group,
                        persistent.group_size,
                        persistent.launch.block,
                        persistent.shared_bytes};
    const auto query = [&](int* groups) {
      // Single CTAs never wait for each other, so any number may run at once.
      *groups = std::numeric_limits<int>::max();
      if (persistent.group == GroupKind::kCta) return cudaSuccess;
      OccupancyExecutor found;
      call.persistent(persistent, nullptr, nullptr, found);
      *groups = found.groups;
      return found.error;
    };
    int fit = 0;
    if ((error = occupancy().groups(key, query, &fit)) != cudaSuccess) return error;
    // Clusters may run one after another. The groups of a cooperative launch must all be resident.
    if (persistent.group == GroupKind::kCluster && fit > 0 && fit < persistent.groups) {
      persistent.groups = fit;
      persistent.launch.grid = int64_t{fit} * persistent.group_size;
    }
    if (fit >= persistent.groups) {
      void* workspace = nullptr;
      if (persistent::needs_barrier_workspace(persistent, call.cumulative)) {
        error = barrier_workspace_for(context.stream, context.host, &workspace);
        if (error != cudaSuccess) return error;
      }
      const int64_t doubles = call.pass == Pass::kForwardTrain ? persistent::forward_scratch(persistent)
                                                               : persistent::backward_scratch(persistent);
      call.persistent(persistent, static_cast<double*>(context.host.scratch(bytes_of(doubles))), workspace, executor);
      if (!is_refusal(executor.error())) return executor.error();
      (void)cudaGetLastError();  // clears the error, which the call recovers from
      occupancy().refuse(key, persistent);
      context.host.warn(std::string("bnkernels: CUDA refused to launch a kernel of ") +
                        std::to_string(persistent.launch.grid) + " blocks (" + cudaGetErrorName(executor.error()) +
                        "). Layers of this kind run as several launches in this process: the same results, but more "
                        "memory traffic. Expected where a green context, MPS or a tool limits the multiprocessors or "
                        "registers.");
      executor = StreamExecutor(context.stream);
    }
  }
  const int64_t doubles = call.pass == Pass::kForwardTrain ? two_pass::forward_train_scratch(plan.two_pass)
                                                           : two_pass::backward_scratch(plan.two_pass);
  call.two_pass(plan.two_pass, static_cast<double*>(context.host.scratch(bytes_of(doubles))), executor);
  return executor.error();
}

// A call that only has the two-pass path: run(plan, executor).
template <typename Run>
cudaError_t run_two_pass(const Problem& problem, const void* x, const Context& context, const Run& run) {
  DeviceLimits limits;
  const cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  StreamExecutor executor(context.stream);
  run(plan_two_pass(problem, two_pass::is_aligned(x), limits), executor);
  return executor.error();
}

// The backward without grad_x, or of inference, has no result that depends on the sums, so caching its inputs has no
// use.
Pass pass_of(const BackwardArgs& args) {
  return args.training && args.grad_x != nullptr ? Pass::kBackwardTrain : Pass::kBackwardEval;
}

}  // namespace

cudaError_t current_device_limits(DeviceLimits* limits) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = known.find(device); found != known.end()) {
      *limits = found->second;
      return cudaSuccess;
    }
  }
  if ((error = query_limits(device, limits)) != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  known[device] = *limits;
  return cudaSuccess;
}

cudaError_t forward_train(const ForwardTrainArgs& args, const Context& context) {
  const auto persistent = [&](const PersistentPlan& plan, double* scratch, void* workspace, auto& executor) {
    persistent::forward_train(args, plan, scratch, workspace, executor);
  };
  const auto two_pass = [&](const TwoPassPlan& plan, double* scratch, auto& executor) {
    two_pass::forward_train(args, plan, scratch, executor);
  };
  return run(args.problem, args.x,
             Sequences{Pass::kForwardTrain, args.epilogue.enabled(), args.cumulative, persistent, two_pass}, context);
}

cudaError_t forward_eval(const ForwardEvalArgs& args, const Context& context) {
  return run_two_pass(args.problem, args.x, context, [&](const TwoPassPlan& plan, StreamExecutor& executor) {
    two_pass::forward_eval(args, plan, executor);
  });
}

cudaError_t backward(const BackwardArgs& args, const Context& context) {
  const auto persistent = [&](const PersistentPlan& plan, double* scratch, void* workspace, auto& executor) {
    persistent::backward(args, plan, scratch, workspace, executor);
  };
  const auto two_pass = [&](const TwoPassPlan& plan, double* scratch, auto& executor) {
    two_pass::backward(args, plan, scratch, executor);
  };
  return run(args.problem, args.x, Sequences{pass_of(args), args.has_relu(), false, persistent, two_pass}, context);
}

cudaError_t statistics(const StatisticsArgs& args, const Context& context) {
  return run_two_pass(args.problem, args.x, context, [&](const TwoPassPlan& plan, StreamExecutor& executor) {
    void* scratch = context.host.scratch(bytes_of(sync::statistics_scratch(plan)));
    sync::statistics(args, plan, static_cast<double*>(scratch), executor);
  });
}

cudaError_t combine_statistics(const CombineStatisticsArgs& args, const Context& context) {
  StreamExecutor executor(context.stream);
  sync::combine_statistics(args, plan_combine(args.channels), executor);
  return executor.error();
}

cudaError_t normalize(const NormalizeArgs& args, const Context& context) {
  return run_two_pass(args.problem, args.x, context, [&](const TwoPassPlan& plan, StreamExecutor& executor) {
    sync::normalize(args, plan, executor);
  });
}

cudaError_t grad_sums(const GradSumsArgs& args, const Context& context) {
  return run_two_pass(args.problem, args.x, context, [&](const TwoPassPlan& plan, StreamExecutor& executor) {
    void* scratch = context.host.scratch(bytes_of(sync::grad_sums_scratch(plan)));
    sync::grad_sums(args, plan, static_cast<double*>(scratch), executor);
  });
}

cudaError_t grad_input(const GradInputArgs& args, const Context& context) {
  return run_two_pass(args.problem, args.x, context, [&](const TwoPassPlan& plan, StreamExecutor& executor) {
    void* scratch = context.host.scratch(bytes_of(sync::grad_input_scratch(plan)));
    const Launch combine = plan_combine(grad_sums_row(args.problem.channels));
    sync::grad_input(args, plan, combine, static_cast<double*>(scratch), executor);
  });
}

}  // namespace bnk::cuda
