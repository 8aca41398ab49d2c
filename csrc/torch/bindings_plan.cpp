#include "bindings_plan.h"

#include <string>
#include <utility>

#include "../plan/plan.h"
#include "dispatch.h"

namespace py = pybind11;

namespace bnk {
namespace {

// Limit on the size of a tensor in bytes: larger than any address space, and small enough for a plan's sums of bytes to
// stay far below 2^63.
constexpr int64_t kMaxTensorBytes = int64_t{1} << 57;

Dtype dtype_of(const std::string& name) {
  if (name == "float64") return Dtype::kFloat64;
  if (name == "float32") return Dtype::kFloat32;
  if (name == "float16") return Dtype::kFloat16;
  if (name == "bfloat16") return Dtype::kBFloat16;
  throw py::value_error("expected dtype to be float64, float32, float16 or bfloat16, but got " + name);
}

Pass pass_of(const std::string& name) {
  if (name == "forward_train") return Pass::kForwardTrain;
  if (name == "forward_eval") return Pass::kForwardEval;
  if (name == "backward_train") return Pass::kBackwardTrain;
  if (name == "backward_eval") return Pass::kBackwardEval;
  throw py::value_error("expected pass_ to be forward_train, forward_eval, backward_train or backward_eval, but got " +
                        name);
}

void check_at_least(const char* name, int64_t value, int64_t least) {
  if (value >= least) return;
  throw py::value_error("expected " + std::string(name) + " to be at least " + std::to_string(least) + ", but got " +
                        std::to_string(value));
}

void check_problem(const Problem& problem) {
  check_at_least("outer", problem.outer, 1);
  check_at_least("channels", problem.channels, 1);
  check_at_least("inner", problem.inner, 1);
  const int64_t most = kMaxTensorBytes / size_of(problem.dtype);
  if (problem.outer > most / problem.channels || problem.outer * problem.channels > most / problem.inner) {
    throw py::value_error("expected outer * channels * inner to be at most " + std::to_string(most) +
                          " elements (2^57 " + "bytes), but got " + std::to_string(problem.outer) + " * " +
                          std::to_string(problem.channels) + " * " + std::to_string(problem.inner));
  }
}

void check_limits(const DeviceLimits& limits) {
  check_at_least("multiprocessors", limits.multiprocessors, 1);
  check_at_least("max_threads_per_multiprocessor", limits.max_threads_per_multiprocessor, 1);
  check_at_least("max_blocks_per_multiprocessor", limits.max_blocks_per_multiprocessor, 1);
  check_at_least("shared_per_multiprocessor", limits.shared_per_multiprocessor, 0);
  check_at_least("shared_per_block", limits.shared_per_block, 0);
  check_at_least("shared_reserved", limits.shared_reserved, 0);
  check_at_least("max_cluster", limits.max_cluster, 0);
}

const char* name_of(Path path) { return path == Path::kPersistent ? "persistent" : "two_pass"; }

const char* name_of(Layout layout) {
  switch (layout) {
    case Layout::kChannelsFirst:
      return "channels_first";
    case Layout::kChannelsLast:
      return "channels_last";
    default:
      return "packed";
  }
}

const char* name_of(GroupKind group) {
  switch (group) {
    case GroupKind::kCta:
      return "cta";
    case GroupKind::kCluster:
      return "cluster";
    default:
      return "grid";
  }
}

py::object name_of(Reason reason) {
  switch (reason) {
    case Reason::kNone:
      return py::none();
    case Reason::kForced:
      return py::str("forced");
    case Reason::kNoReduction:
      return py::str("no_reduction");
    case Reason::kNoCooperation:
      return py::str("no_cooperation");
    default:
      return py::str("does_not_fit");
  }
}

py::dict dict_of(const Traffic& traffic) {
  py::dict result;
  result["read"] = traffic.read;
  result["written"] = traffic.written;
  return result;
}

py::dict dict_of(const TilePartition& partition) {
  py::dict result;
  result["layout"] = name_of(partition.layout);
  result["channel_tiles"] = partition.channel_tiles.value;
  result["tile_channels"] = partition.tile_channels;
  result["splits"] = partition.splits;
  result["split_size"] = partition.split_size;
  result["threads_c"] = partition.threads_c;
  result["row_vectors"] = partition.row_vectors.value;
  result["step_rows"] = partition.step_rows;
  result["step_vectors"] = partition.step_vectors;
  return result;
}

py::dict dict_of(const TwoPassPlan& plan) {
  py::dict result;
  result["partition"] = dict_of(plan.partition);
  result["grid"] = plan.tile_launch.grid;
  result["block"] = plan.tile_launch.block;
  result["finalize_grid"] = plan.finalize_launch.grid;
  result["finalize_block"] = plan.finalize_launch.block;
  result["finalize_threads_c"] = plan.finalize.threads_c;
  return result;
}

py::dict dict_of(const PersistentPlan& plan) {
  py::dict result;
  result["partition"] = dict_of(plan.partition);
  result["group"] = name_of(plan.group);
  result["group_size"] = plan.group_size;
  result["groups"] = plan.groups;
  result["cached_vectors"] = plan.cached_vectors;
  result["grid"] = plan.launch.grid;
  result["block"] = plan.launch.block;
  result["shared_bytes"] = plan.shared_bytes;
  result["shared_overhead"] = persistent_overhead(plan.partition.layout);
  result["two_shot"] = plan.two_shot;
  result["combine_threads_c"] = plan.combine_threads_c;
  return result;
}

// Returns a plan as a dict. The limits have the names of device_limits().
py::dict plan(int64_t outer, int64_t channels, int64_t inner, const std::string& dtype, const std::string& pass,
              bool aligned, int multiprocessors, int max_threads_per_multiprocessor, int max_blocks_per_multiprocessor,
              int64_t shared_per_multiprocessor, int64_t shared_per_block, int64_t shared_reserved,
              bool cooperative_launch, int max_cluster, bool force_two_pass) {
  const Problem problem{outer, channels, inner, dtype_of(dtype)};
  const DeviceLimits limits{multiprocessors,
                            max_threads_per_multiprocessor,
                            max_blocks_per_multiprocessor,
                            shared_per_multiprocessor,
                            shared_per_block,
                            shared_reserved,
                            cooperative_launch,
                            max_cluster};
  const Pass computed = pass_of(pass);
  check_problem(problem);
  check_limits(limits);
  const Plan plan = plan_pass(problem, computed, aligned, limits, PlanOptions{force_two_pass});
  py::dict result;
  result["path"] = name_of(plan.path);
  result["reason"] = name_of(plan.reason);
  result["two_pass"] = dict_of(plan.two_pass);
  result["persistent"] = plan.path == Path::kPersistent ? py::object(dict_of(plan.persistent)) : py::object(py::none());
  result["floor"] = dict_of(plan.floor);
  result["predicted"] = dict_of(plan.predicted);
  result["exchanged"] = dict_of(plan.exchanged);
  return result;
}

py::dict limits_of(int device) {
  const DeviceLimits limits = device_limits(device);
  py::dict result;
  result["multiprocessors"] = limits.multiprocessors;
  result["max_threads_per_multiprocessor"] = limits.max_threads_per_multiprocessor;
  result["max_blocks_per_multiprocessor"] = limits.max_blocks_per_multiprocessor;
  result["shared_per_multiprocessor"] = limits.shared_per_multiprocessor;
  result["shared_per_block"] = limits.shared_per_block;
  result["shared_reserved"] = limits.shared_reserved;
  result["cooperative_launch"] = limits.cooperative_launch;
  result["max_cluster"] = limits.max_cluster;
  return result;
}

}  // namespace

void bind_plan(py::module_& module) {
  using py::arg;
  module.def("plan", &plan, arg("outer"), arg("channels"), arg("inner"), arg("dtype"), arg("pass_"), arg("aligned"),
             arg("multiprocessors"), arg("max_threads_per_multiprocessor"), arg("max_blocks_per_multiprocessor"),
             arg("shared_per_multiprocessor"), arg("shared_per_block"), arg("shared_reserved"),
             arg("cooperative_launch"), arg("max_cluster"), arg("force_two_pass") = false);
  module.def("device_limits", &limits_of, arg("device"));
}

}  // namespace bnk
