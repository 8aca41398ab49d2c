#include <algorithm>

#include "partition.h"

namespace bnk {
namespace {

// Threads per CTA of the tile kernels: enough warps to hide latency, few enough that two CTAs fit on a multiprocessor
// with the registers of a tile in flight.
constexpr int kBlockThreads = 256;
// Threads per CTA that combine the ranks' rows: each waits for one value per rank, so small CTAs spread over the
// device.
constexpr int kCombineThreads = 128;
// Minimum vectors per thread before a channel tile is split further: one tile, so that its loads overlap.
constexpr int64_t kMinVectorsPerThread = 4;

Layout layout_of(const Problem& problem) {
  return problem.channels_last() ? Layout::kChannelsLast : Layout::kChannelsFirst;
}

int threads_c_of(const Problem& problem) { return problem.channels_last() ? widest_threads_c(problem) : 1; }

int choose_block(const Problem& problem, bool aligned) {
  if (problem.channels_last()) return kBlockThreads;
  // A small channel gets a small CTA, so that all threads have work.
  const int64_t threads = ceil_div(tile_units(problem, Layout::kChannelsFirst, aligned), kPlanWarp) * kPlanWarp;
  return static_cast<int>(std::min<int64_t>(threads, kBlockThreads));
}

}  // namespace

TwoPassPlan make_two_pass(const Problem& problem, bool aligned, int block, int64_t splits) {
  TwoPassPlan plan{};
  plan.partition =
      make_partition(problem, layout_of(problem), threads_c_of(problem), aligned, block, std::max<int64_t>(1, splits));
  plan.finalize = {problem.channels, plan.partition.splits, combine_threads_c(problem.channels, plan.partition.splits)};
  plan.tile_launch = {std::min(plan.partition.channel_tiles.value * plan.partition.splits, kMaxGrid), block};
  plan.finalize_launch = {std::min(ceil_div(problem.channels, plan.finalize.threads_c), kMaxGrid), kBlockThreads};
  return plan;
}

TwoPassPlan plan_two_pass(const Problem& problem, bool aligned, const DeviceLimits& limits) {
  const int block = choose_block(problem, aligned);
  const Layout layout = layout_of(problem);
  const TilePartition whole = make_partition(problem, layout, threads_c_of(problem), aligned, block, 1);
  // At most as many work tiles as could be resident at once: enough to fill the device, and more would cost additional
  // partials without benefit.
  const int64_t resident =
      static_cast<int64_t>(limits.multiprocessors) * std::max(1, limits.max_threads_per_multiprocessor / block);
  const int64_t wanted = ceil_div(resident, whole.channel_tiles.value);
  const int64_t units = tile_units(problem, layout, aligned);
  const int64_t threads = block / whole.threads_c;
  const int64_t splits = std::min(wanted, ceil_div(units, threads * kMinVectorsPerThread));
  const bool exact_chains = problem.dtype != Dtype::kFloat64;
  const int64_t needed = exact_chains ? 1 : ceil_div(units, threads * kMaxVectorsPerThreadFloat64);
  return make_two_pass(problem, aligned, block, std::max(splits, needed));
}

Launch plan_combine(int64_t values) { return {std::min(ceil_div(values, kCombineThreads), kMaxGrid), kCombineThreads}; }

}  // namespace bnk
