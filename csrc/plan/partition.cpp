#include "partition.h"

#include <algorithm>

namespace bnk {
namespace {

// Minimum number of channels that a CTA combines at once: this many doubles fill one memory sector.
constexpr int kMinCombineThreadsC = 4;
// A tile iterator counts the units of its work tile in 32 bits and may step past the end once.
constexpr int64_t kMaxSplitSize = int64_t{1} << 30;

// Vectors that cover a row: the minimum if every row starts on a vector boundary, else enough for any start.
int64_t vectors_per_row(const Problem& problem, bool aligned) {
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

int64_t tile_units(const Problem& problem, Layout layout, bool aligned) {
  return layout == Layout::kChannelsFirst ? problem.outer * vectors_per_row(problem, aligned) : problem.outer;
}

int widest_threads_c(const Problem& problem) {
  return power_of_two_at_least(ceil_div(problem.channels, vector_elements(problem.dtype)), kMaxThreadsC);
}

TilePartition make_partition(const Problem& problem, Layout layout, int threads_c, bool aligned, int block,
                             int64_t splits) {
  TilePartition partition{};
  partition.layout = layout;
  partition.outer = problem.outer;
  partition.channels = problem.channels;
  partition.inner = problem.inner;
  const int64_t units = tile_units(problem, layout, aligned);
  partition.split_size = std::min(ceil_div(units, splits), kMaxSplitSize);
  partition.splits = ceil_div(units, partition.split_size);
  if (layout == Layout::kChannelsFirst) {
    const int64_t vectors = vectors_per_row(problem, aligned);
    partition.row_vectors = make_divisor(vectors);
    partition.step_rows = block / vectors;
    partition.step_vectors = block % vectors;
    partition.threads_c = 1;
    partition.tile_channels = 1;
  } else {
    partition.threads_c = threads_c;
    partition.tile_channels = static_cast<int>(threads_c * vector_elements(problem.dtype) / problem.inner);
  }
  partition.channel_tiles = make_divisor(ceil_div(problem.channels, partition.tile_channels));
  return partition;
}

int combine_threads_c(int64_t channels, int64_t splits) {
  const int threads_c =
      std::max(kMaxBlockThreads / power_of_two_at_least(splits, kMaxBlockThreads), kMinCombineThreadsC);
  return power_of_two_at_least(channels, std::min(threads_c, kPlanWarp));
}

}  // namespace bnk
