#include "plan.h"

#include <algorithm>

namespace bnk {
namespace {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;

// Threads that walk an array: enough warps a block to hide latency, few enough that two blocks fit beside each other
// with the registers that a tile in flight takes.
constexpr int kBlockThreads = 256;
// Windows a thread should at least have before a slab is cut finer: one tile, so that its loads overlap.
constexpr int64_t kMinWindowsPerThread = 4;
// Windows a thread may at most have of float64 data. Its sums are of the data's own precision, and equal values added one
// after the other all round the same way: the chain, not the tree above it, sets the error. (The sums of smaller dtypes
// are joined in double, where no chain is too long.)
constexpr int64_t kMaxWindowsPerThreadFloat64 = 128;
// Channels that a block finishes side by side, at least: so many doubles are one memory sector.
constexpr int kMinFinishLanes = 4;
constexpr int64_t kMaxGrid = 0x7fffffff;

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// The least power of two >= value, or `limit`, a power of two, if that is less.
int power_of_two_at_least(int64_t value, int limit) {
  int power = 1;
  while (power < limit && power < value) power *= 2;
  return power;
}

int vector_elements(Dtype dtype) { return kVectorBytes / size_of(dtype); }

// Windows that cover a row: of the least number if every row starts on a vector boundary, else wherever it starts.
int64_t windows_per_row(const Problem& problem, bool aligned) {
  const int vector = vector_elements(problem.dtype);
  if (aligned && problem.inner % vector == 0) return problem.inner / vector;
  return ceil_div(problem.inner - 1, vector) + 1;
}

// Units of a slab that chunks divide: windows (channels-first) or rows (channels-last).
int64_t slab_units(const Problem& problem, bool aligned) {
  return problem.channels_last() ? problem.outer : problem.outer * windows_per_row(problem, aligned);
}

int choose_lanes(const Problem& problem) {
  if (!problem.channels_last()) return 1;
  const int64_t vectors = ceil_div(problem.channels, vector_elements(problem.dtype));
  return power_of_two_at_least(vectors, kMaxLanes);
}

int choose_block(const Problem& problem, bool aligned) {
  if (problem.channels_last()) return kBlockThreads;
  // A small channel gets a small block, so that its threads have something to do.
  const int64_t threads = ceil_div(slab_units(problem, aligned), kWarp) * kWarp;
  return static_cast<int>(std::min<int64_t>(threads, kBlockThreads));
}

Divisor divisor(int64_t value) { return {value, 1 / static_cast<double>(value)}; }

Walk make_walk(const Problem& problem, bool aligned, int block, int64_t chunks) {
  Walk walk{};
  walk.outer = problem.outer;
  walk.channels = problem.channels;
  walk.inner = problem.inner;
  walk.lanes = choose_lanes(problem);
  const int64_t units = slab_units(problem, aligned);
  walk.chunk_size = ceil_div(units, chunks);
  walk.chunks = ceil_div(units, walk.chunk_size);
  if (problem.channels_last()) {
    walk.slabs = divisor(ceil_div(problem.channels, static_cast<int64_t>(walk.lanes) * vector_elements(problem.dtype)));
  } else {
    const int64_t windows = windows_per_row(problem, aligned);
    walk.slabs = divisor(problem.channels);
    walk.windows = divisor(windows);
    walk.step_rows = block / windows;
    walk.step_windows = block % windows;
  }
  return walk;
}

// The more chunks a channel has, the more threads join them.
Finish make_finish(const Problem& problem, int64_t chunks) {
  const int lanes = std::max(kBlockThreads / power_of_two_at_least(chunks, kBlockThreads), kMinFinishLanes);
  return {problem.channels, chunks, power_of_two_at_least(problem.channels, std::min(lanes, kWarp))};
}

}  // namespace

StreamingPlan make_streaming(const Problem& problem, bool aligned, int block, int64_t chunks) {
  StreamingPlan plan{};
  plan.walk = make_walk(problem, aligned, block, std::max<int64_t>(1, chunks));
  plan.finish = make_finish(problem, plan.walk.chunks);
  plan.walk_launch = {std::min(plan.walk.slabs.value * plan.walk.chunks, kMaxGrid), block};
  plan.finish_launch = {std::min(ceil_div(problem.channels, plan.finish.lanes), kMaxGrid), kBlockThreads};
  return plan;
}

StreamingPlan plan_streaming(const Problem& problem, bool aligned, const DeviceLimits& limits) {
  const int block = choose_block(problem, aligned);
  const Walk whole = make_walk(problem, aligned, block, 1);
  // As many shares as could at most be resident at once: enough to fill the device in any case, and no more than the
  // partials that they leave are worth.
  const int64_t resident =
      static_cast<int64_t>(limits.multiprocessors) * std::max(1, limits.max_threads_per_multiprocessor / block);
  const int64_t wanted = ceil_div(resident, whole.slabs.value);
  const int64_t units = slab_units(problem, aligned);
  const int64_t threads = block / whole.lanes;
  const int64_t chunks = std::min(wanted, ceil_div(units, threads * kMinWindowsPerThread));
  const bool exact_chains = problem.dtype != Dtype::kFloat64;
  const int64_t needed = exact_chains ? 1 : ceil_div(units, threads * kMaxWindowsPerThreadFloat64);
  return make_streaming(problem, aligned, block, std::max(chunks, needed));
}

}  // namespace bnk
