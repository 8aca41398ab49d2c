#include <algorithm>
#include <numeric>

#include "partition.h"

namespace bnk {
namespace {

// A cooperative launch starts only when all its CTAs fit at once. Leave one in this many multiprocessors free, so that
// the launch does not wait for concurrent kernels such as collectives; the other multiprocessors saturate memory.
constexpr int kSparedOf = 16;

// A cluster lies within one graphics processing cluster (GPC). The GPCs of Hopper and Blackwell have 16 multiprocessors
// or a few more, and no device attribute gives the number: run() in cuda/backend.cu queries how many clusters fit.
constexpr int64_t kClusterMultiprocessors = 16;

// Cost of one round of a group apart from streaming, as the bytes that a CTA could move in that time: 16 KB per
// microsecond on an H200 with two CTAs per multiprocessor. Estimates, to be tuned by measurement.
constexpr int64_t kRoundCost = 24 * 1024;          // latency of the first load, reductions within the CTA
constexpr int64_t kClusterBarrierCost = 8 * 1024;  // a cluster barrier and the loads after it
constexpr int64_t kBarrierCost = 32 * 1024;        // a grid group's barrier and the loads after it
// Use the two-shot all-reduce when a one-shot CTA would read more than this many bytes of partials.
constexpr int64_t kTwoShotAbove = 24 * 1024;
constexpr int64_t kPartialBytes = 3 * sizeof(double);
constexpr int64_t kMostRounds = 8;  // upper bound of the search

// The cached vectors are the sample whose mean is the pivot of all others (persistent_forward.cuh), so they must be a
// sizeable part.
constexpr int64_t kMinCachedShare = 16;  // at least one vector in this many

// The persistent kernels count channel tiles, and the elements of a row, in 32 bits and may step past the last once.
constexpr int64_t kMaxChannelTiles = int64_t{1} << 30;
constexpr int64_t kMaxPersistentRow = int64_t{1} << 30;

// Minimum number of adjacent vectors per packed row: contiguous runs of several cache lines.
constexpr int64_t kMinPackedThreadsC = 16;

int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

// A candidate layout and CTA size.
struct Shape {
  Layout layout;
  int threads_c;
  int block;
};

// Units of a split that a CTA covers per step.
int64_t step_of(const Shape& shape) {
  return shape.layout == Layout::kChannelsFirst ? shape.block : shape.block / shape.threads_c;
}

// The CTA for `units` units of each of `threads_c` threads along C.
Shape shape_of(Layout layout, int64_t threads_c, int64_t units) {
  const int64_t rows = std::min(units, persistent_threads(layout) / threads_c);
  return {layout, static_cast<int>(threads_c), static_cast<int>(round_up(threads_c * rows, kPlanWarp))};
}

template <typename Visit>
void each_shape(const Problem& problem, bool aligned, const Visit& visit) {
  if (problem.channels_last()) {
    const int widest = widest_threads_c(problem);
    visit(shape_of(Layout::kChannelsLast, widest, problem.outer));
    if (widest == kMaxThreadsC) visit(shape_of(Layout::kChannelsLast, widest / 2, problem.outer));
    return;
  }
  const int64_t units = tile_units(problem, Layout::kChannelsFirst, aligned);
  visit(shape_of(Layout::kChannelsFirst, 1, units));
  const int64_t vector = vector_elements(problem.dtype);
  if (!aligned || problem.inner < vector || problem.channels * problem.inner % vector != 0) return;
  // The smallest number of channels that begins and ends on a vector boundary.
  const int64_t least = vector / std::gcd(vector, problem.inner);
  const int64_t most = std::min<int64_t>(kMaxTileChannels<Layout::kPacked>, problem.channels);
  for (int64_t channels = least; channels <= most; channels += channels) {
    const int64_t threads_c = channels * problem.inner / vector;
    if (threads_c > kMaxPackedThreadsC) return;
    if (threads_c < kMinPackedThreadsC && 2 * channels <= most) continue;
    visit(shape_of(Layout::kPacked, threads_c, problem.outer));
  }
}

struct Room {
  int64_t multiprocessors;
  int64_t beside;       // CTAs per multiprocessor
  int64_t cooperating;  // CTAs that a cooperative launch can run at once
  int cached_vectors;   // vectors of each tensor that each thread can cache
};

Room room_for(const Shape& shape, Pass pass, const DeviceLimits& limits) {
  const int64_t threads = limits.max_threads_per_multiprocessor;
  // The kernels' registers are bounded so that kMinBlocksPerMultiprocessor CTAs of the largest size fit.
  const int64_t by_registers = kMinBlocksPerMultiprocessor * persistent_threads(shape.layout) / shape.block;
  // Each CTA must have shared memory for at least one tile of kVectorsPerThread vectors per thread.
  const int64_t tile = int64_t{kVectorBytes} * kVectorsPerThread * shape.block * tensors_read(pass);
  const int64_t by_shared =
      limits.shared_per_multiprocessor / (limits.shared_reserved + persistent_overhead(shape.layout) + tile);
  const int64_t beside = std::min<int64_t>(
      {by_registers, by_shared, threads / shape.block, int64_t{limits.max_blocks_per_multiprocessor}});
  if (beside == 0) return {};
  const int64_t shared =
      std::min(limits.shared_per_multiprocessor / beside - limits.shared_reserved, limits.shared_per_block) -
      persistent_overhead(shape.layout);
  const int64_t vectors = shared / (int64_t{kVectorBytes} * shape.block * tensors_read(pass));
  const int cooperating = limits.multiprocessors - limits.multiprocessors / kSparedOf;
  return {limits.multiprocessors, beside, beside * cooperating, static_cast<int>(std::max<int64_t>(0, vectors))};
}

// Groups that run at once. Single CTAs and clusters never wait for another group, so no multiprocessors are left free.
int64_t groups_at_once(const Room& room, GroupKind group, int64_t group_size) {
  if (group == GroupKind::kGrid) return std::min<int64_t>(room.cooperating / group_size, kMaxBarrierGroups);
  if (group == GroupKind::kCta) return room.multiprocessors * room.beside;
  const int64_t whole = room.multiprocessors / kClusterMultiprocessors;
  const int64_t rest = room.multiprocessors % kClusterMultiprocessors;
  return whole * (kClusterMultiprocessors * room.beside / group_size) + rest * room.beside / group_size;
}

// In a partial first or last vector of a row, about half of the elements belong to the row; they are stored one by one.
int64_t written_in_parts(const Problem& problem, Layout layout, bool aligned, const TilePartition& partition,
                         int64_t vectors) {
  const int vector = vector_elements(problem.dtype);
  if (layout != Layout::kChannelsFirst || (aligned && problem.inner % vector == 0)) return 0;
  return ceil_div(2 * vectors, partition.row_vectors.value) * (vector / 2);
}

struct Candidate {
  PersistentChoice choice;
  // The pass's time, as the bytes that one of kMinBlocksPerMultiprocessor resident CTAs could move in it.
  int64_t cost;
};

GroupKind group_of(int64_t group_size, bool cluster) {
  if (group_size == 1) return GroupKind::kCta;
  return cluster ? GroupKind::kCluster : GroupKind::kGrid;
}

// The choice with the given group size; cost < 0 if it is not feasible.
Candidate candidate(const Problem& problem, Pass pass, bool aligned, const Shape& shape, const Room& room, bool cluster,
                    int64_t group_size) {
  const TilePartition partition =
      make_partition(problem, shape.layout, shape.threads_c, aligned, shape.block, group_size);
  const GroupKind group = group_of(partition.splits, cluster);
  const int64_t vectors = ceil_div(partition.split_size, step_of(shape));  // per thread
  const int64_t cached_vectors = std::min<int64_t>(vectors, room.cached_vectors);
  if (cached_vectors * kMinCachedShare < vectors) return {{}, -1};
  if (partition.channel_tiles.value > kMaxChannelTiles || problem.inner > kMaxPersistentRow) return {{}, -1};
  if (problem.dtype == Dtype::kFloat64 && vectors > kMaxVectorsPerThreadFloat64) return {{}, -1};
  const int64_t groups = std::min(groups_at_once(room, group, partition.splits), partition.channel_tiles.value);
  if (groups == 0) return {{}, -1};
  const int64_t rounds = ceil_div(partition.channel_tiles.value, groups);
  const int64_t combined = partition.splits * partition.tile_channels * kPartialBytes;
  const bool two_shot = group == GroupKind::kGrid && combined > kTwoShotAbove;
  const int64_t tensors = tensors_read(pass);
  const int64_t moved = (tensors + 1) * vectors + tensors * std::max<int64_t>(0, vectors - cached_vectors) +
                        written_in_parts(problem, shape.layout, aligned, partition, vectors);
  int64_t waited = kRoundCost;
  if (group == GroupKind::kCluster) waited += kClusterBarrierCost + combined;
  if (group == GroupKind::kGrid) waited += kBarrierCost + (two_shot ? kBarrierCost : combined);
  const PersistentChoice choice{shape.layout,
                                shape.threads_c,
                                shape.block,
                                static_cast<int>(partition.splits),
                                static_cast<int>(groups),
                                static_cast<int>(cached_vectors),
                                two_shot,
                                cluster};
  // The more CTAs share a multiprocessor, the longer each takes.
  return {choice, rounds * (moved * kVectorBytes * shape.block * room.beside / kMinBlocksPerMultiprocessor + waited)};
}

// The cheapest feasible choice over all shapes and group sizes.
Candidate cheapest(const Problem& problem, Pass pass, bool aligned, const DeviceLimits& limits) {
  Candidate best{{}, -1};
  each_shape(problem, aligned, [&](const Shape& shape) {
    const Room room = room_for(shape, pass, limits);
    if (room.cached_vectors == 0) return;
    const int64_t units = tile_units(problem, shape.layout, aligned);
    const int64_t channel_tiles =
        make_partition(problem, shape.layout, shape.threads_c, aligned, shape.block, 1).channel_tiles.value;
    const auto consider = [&](int64_t group_size, bool cluster = false) {
      const Candidate one = candidate(problem, pass, aligned, shape, room, cluster, group_size);
      if (one.cost >= 0 && (best.cost < 0 || one.cost < best.cost)) best = one;
    };
    const int64_t max_group_size = ceil_div(units, step_of(shape));  // upper bound of a useful group size
    // The smallest group that caches the whole channel tile.
    const int64_t enough = ceil_div(units, room.cached_vectors * step_of(shape));
    // Clusters must cache the whole channel tile. Without cooperative launches the largest cluster is considered too.
    const int64_t most_in_cluster = std::min<int64_t>(limits.max_cluster, max_group_size);
    const int64_t least_in_cluster = limits.cooperative_launch ? enough : std::min(enough, most_in_cluster);
    for (int64_t group_size = std::max<int64_t>(2, least_in_cluster); group_size <= most_in_cluster; ++group_size) {
      consider(group_size, true);
    }
    const int64_t most = limits.cooperative_launch ? std::min(room.cooperating, max_group_size) : 1;
    // If no group caches the whole channel tile, the largest group caches the most.
    const int64_t least = std::min(enough, most);
    consider(least);
    // The same number of groups, enlarged to use all CTAs that can run at once.
    const int64_t groups = std::min(room.cooperating / least, channel_tiles);
    if (groups > 0) consider(std::min(room.cooperating / groups, most));
    for (int64_t rounds = 1; rounds <= std::min(channel_tiles, kMostRounds); ++rounds) {
      const int64_t group_size =
          std::min(room.cooperating / std::min(room.cooperating, ceil_div(channel_tiles, rounds)), most);
      if (group_size > least) consider(group_size);
    }
  });
  return best;
}

// Bytes of one channel of each tensor that are not cached and therefore read twice.
int64_t read_again(const Problem& problem, const PersistentPlan& plan, int64_t units) {
  const Shape shape{plan.partition.layout, plan.partition.threads_c, plan.launch.block};
  const int64_t cached_vectors = plan.cached_vectors * step_of(shape);
  const int64_t last = units - (plan.partition.splits - 1) * plan.partition.split_size;
  const int64_t again = (plan.partition.splits - 1) * std::max<int64_t>(0, plan.partition.split_size - cached_vectors) +
                        std::max<int64_t>(0, last - cached_vectors);
  // A unit is a row or a vector's part of a row. Adjacent rows that meet inside a vector share that vector; counting it
  // fully for each would count short rows many times over.
  const int64_t row_bytes = problem.inner * size_of(problem.dtype);
  return shape.layout == Layout::kChannelsFirst ? again * row_bytes / plan.partition.row_vectors.value
                                                : again * row_bytes;
}

Traffic exchanged_by(const PersistentPlan& plan, Pass pass) {
  if (plan.group != GroupKind::kGrid) return {0, 0};
  const bool forward = pass == Pass::kForwardTrain;
  const int64_t bytes = plan.partition.channels * static_cast<int64_t>(sizeof(double));
  const int64_t partials = (forward ? 3 : 2) * bytes * plan.group_size;
  if (!plan.two_shot) return {partials * plan.group_size, partials};
  // In the two-shot exchange, the CTA that reduces a channel passes two values to the others. In the forward these are
  // its results (mean and invstd), which it writes anyway.
  return forward ? Traffic{partials, partials} : Traffic{partials + 2 * bytes * plan.group_size, partials + 2 * bytes};
}

}  // namespace

PersistentPlan make_persistent(const Problem& problem, bool aligned, Pass pass, const PersistentChoice& choice) {
  PersistentPlan plan{};
  plan.partition = make_partition(problem, choice.layout, choice.threads_c, aligned, choice.block, choice.group_size);
  plan.group_size = static_cast<int>(plan.partition.splits);
  plan.group = group_of(plan.group_size, choice.cluster);
  plan.groups = static_cast<int>(std::min<int64_t>(choice.groups, plan.partition.channel_tiles.value));
  plan.cached_vectors = choice.cached_vectors;
  plan.launch = {int64_t{plan.groups} * plan.group_size, choice.block};
  plan.shared_bytes = int64_t{kVectorBytes} * choice.block * choice.cached_vectors * tensors_read(pass);
  plan.two_shot = choice.two_shot && plan.group == GroupKind::kGrid;
  const int64_t combined =
      plan.two_shot ? ceil_div(plan.partition.tile_channels, plan.group_size) : plan.partition.tile_channels;
  plan.combine_threads_c = combine_threads_c(combined, plan.group_size);
  return plan;
}

Plan plan_pass(const Problem& problem, Pass pass, bool aligned, const DeviceLimits& limits,
               const PlanOptions& options) {
  Plan plan{};
  plan.two_pass = plan_two_pass(problem, aligned, limits);
  const int64_t tensor = problem.elements() * size_of(problem.dtype);
  const int64_t read = tensors_read(pass) * tensor;
  const bool training = pass == Pass::kForwardTrain || pass == Pass::kBackwardTrain;
  const bool reads_x = pass != Pass::kBackwardEval;
  plan.floor = {read, tensor};
  plan.predicted = {training ? 2 * read : reads_x ? read : read + tensor, tensor};

  const Candidate best = training ? cheapest(problem, pass, aligned, limits) : Candidate{{}, -1};
  plan.reason = !training                   ? Reason::kNoReduction
                : options.force_two_pass    ? Reason::kForced
                : best.cost >= 0            ? Reason::kNone
                : limits.cooperative_launch ? Reason::kDoesNotFit
                                            : Reason::kNoCooperation;
  if (plan.reason != Reason::kNone) return plan;
  plan.path = Path::kPersistent;
  plan.persistent = make_persistent(problem, aligned, pass, best.choice);
  const int64_t again = read_again(problem, plan.persistent, tile_units(problem, best.choice.layout, aligned));
  plan.predicted = {read + tensors_read(pass) * again * problem.channels, tensor};
  plan.exchanged = exchanged_by(plan.persistent, pass);
  return plan;
}

}  // namespace bnk
