#include "plan_walk.h"

#include <algorithm>

namespace bnk {
namespace {

constexpr int kVectorBytes = 16;
// Channels that a block joins side by side, at least: so many doubles are one memory sector.
constexpr int kMinJoinLanes = 4;
// A walker counts the units of its share in 32 bits, and may step past its end once.
constexpr int64_t kMaxChunkSize = int64_t{1} << 30;

// Windows that cover a row: of the least number if every row starts on a vector boundary, else wherever it starts.
int64_t windows_per_row(const Problem& problem, bool aligned) {
  const int vector = vector_elements(problem.dtype);
  if (aligned && problem.inner % vector == 0) return problem.inner / vector;
  return ceil_div(problem.inner - 1, vector) + 1;
}

}  // namespace

Divisor make_divisor(int64_t value) { return {value, 1 / static_cast<double>(value)}; }

int power_of_two_at_least(int64_t value, int limit) {
  int power = 1;
  while (power < limit && power < value) power *= 2;
  return power;
}

int vector_elements(Dtype dtype) { return kVectorBytes / size_of(dtype); }

int64_t slab_units(const Problem& problem, Layout layout, bool aligned) {
  return layout == Layout::kChannelsFirst ? problem.outer * windows_per_row(problem, aligned) : problem.outer;
}

int widest_lanes(const Problem& problem) {
  return power_of_two_at_least(ceil_div(problem.channels, vector_elements(problem.dtype)), kMaxLanes);
}

Walk make_walk(const Problem& problem, Layout layout, int lanes, bool aligned, int block, int64_t chunks) {
  Walk walk{};
  walk.layout = layout;
  walk.outer = problem.outer;
  walk.channels = problem.channels;
  walk.inner = problem.inner;
  const int64_t units = slab_units(problem, layout, aligned);
  walk.chunk_size = std::min(ceil_div(units, chunks), kMaxChunkSize);
  walk.chunks = ceil_div(units, walk.chunk_size);
  if (layout == Layout::kChannelsFirst) {
    const int64_t windows = windows_per_row(problem, aligned);
    walk.windows = make_divisor(windows);
    walk.step_rows = block / windows;
    walk.step_windows = block % windows;
    walk.lanes = 1;
    walk.slab_channels = 1;
  } else {
    walk.lanes = lanes;
    walk.slab_channels = static_cast<int>(lanes * vector_elements(problem.dtype) / problem.inner);
  }
  walk.slabs = make_divisor(ceil_div(problem.channels, walk.slab_channels));
  return walk;
}

int join_lanes(int64_t channels, int64_t chunks) {
  const int lanes = std::max(kMaxBlockThreads / power_of_two_at_least(chunks, kMaxBlockThreads), kMinJoinLanes);
  return power_of_two_at_least(channels, std::min(lanes, kPlanWarp));
}

}  // namespace bnk
