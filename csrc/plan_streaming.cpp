#include <algorithm>

#include "plan_walk.h"

namespace bnk {
namespace {

// Threads that walk an array: enough warps a block to hide latency, few enough that two blocks fit beside each other
// with the registers that a tile in flight takes.
constexpr int kBlockThreads = 256;
// Threads that join what ranks have told: each waits for one value a rank, so small blocks spread over the device.
constexpr int kJoinThreads = 128;
// Windows a thread should at least have before a slab is cut finer: one tile, so that its loads overlap.
constexpr int64_t kMinWindowsPerThread = 4;
// Windows a thread may at most have of float64 data. Its sums are of the data's own precision, and equal values added one
// after the other all round the same way: the chain, not the tree above it, sets the error. (The sums of smaller dtypes
// are joined in double, where no chain is too long.)
constexpr int64_t kMaxWindowsPerThreadFloat64 = 128;

Layout layout_of(const Problem& problem) {
  return problem.channels_last() ? Layout::kChannelsLast : Layout::kChannelsFirst;
}

int lanes_of(const Problem& problem) { return problem.channels_last() ? widest_lanes(problem) : 1; }

int choose_block(const Problem& problem, bool aligned) {
  if (problem.channels_last()) return kBlockThreads;
  // A small channel gets a small block, so that its threads have something to do.
  const int64_t threads = ceil_div(slab_units(problem, Layout::kChannelsFirst, aligned), kPlanWarp) * kPlanWarp;
  return static_cast<int>(std::min<int64_t>(threads, kBlockThreads));
}

}  // namespace

StreamingPlan make_streaming(const Problem& problem, bool aligned, int block, int64_t chunks) {
  StreamingPlan plan{};
  plan.walk = make_walk(problem, layout_of(problem), lanes_of(problem), aligned, block, std::max<int64_t>(1, chunks));
  plan.finish = {problem.channels, plan.walk.chunks, join_lanes(problem.channels, plan.walk.chunks)};
  plan.walk_launch = {std::min(plan.walk.slabs.value * plan.walk.chunks, kMaxGrid), block};
  plan.finish_launch = {std::min(ceil_div(problem.channels, plan.finish.lanes), kMaxGrid), kBlockThreads};
  return plan;
}

StreamingPlan plan_streaming(const Problem& problem, bool aligned, const DeviceLimits& limits) {
  const int block = choose_block(problem, aligned);
  const Layout layout = layout_of(problem);
  const Walk whole = make_walk(problem, layout, lanes_of(problem), aligned, block, 1);
  // As many shares as could at most be resident at once: enough to fill the device in any case, and no more than the
  // partials that they leave are worth.
  const int64_t resident =
      static_cast<int64_t>(limits.multiprocessors) * std::max(1, limits.max_threads_per_multiprocessor / block);
  const int64_t wanted = ceil_div(resident, whole.slabs.value);
  const int64_t units = slab_units(problem, layout, aligned);
  const int64_t threads = block / whole.lanes;
  const int64_t chunks = std::min(wanted, ceil_div(units, threads * kMinWindowsPerThread));
  const bool exact_chains = problem.dtype != Dtype::kFloat64;
  const int64_t needed = exact_chains ? 1 : ceil_div(units, threads * kMaxWindowsPerThreadFloat64);
  return make_streaming(problem, aligned, block, std::max(chunks, needed));
}

Launch plan_join(int64_t values) { return {std::min(ceil_div(values, kJoinThreads), kMaxGrid), kJoinThreads}; }

}  // namespace bnk
