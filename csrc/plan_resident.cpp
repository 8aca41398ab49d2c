#include <algorithm>
#include <numeric>

#include "plan_walk.h"

namespace bnk {
namespace {

constexpr int kVectorBytes = 16;

// A cooperative launch starts when all its blocks fit at once. One in so many multiprocessors is left free, so that it does
// not wait for, say, the collectives that run beside it; memory is saturated without them.
constexpr int kSparedOf = 16;

// A hardware cluster lies within one of the device's processing clusters. Those of Hopper and Blackwell have 16
// multiprocessors or a few more, and no attribute tells how many: confirm() in cuda/backend.cpp asks for the groups that fit.
constexpr int64_t kClusterMultiprocessors = 16;

// What is not streaming costs a round of a group, in bytes that a block could move meanwhile: on an H200 with two blocks on
// each multiprocessor that is 16 KB a microsecond. Estimates, to be tuned by measurement.
constexpr int64_t kRoundCost = 24 * 1024;          // the first load's latency, the block's reductions
constexpr int64_t kClusterBarrierCost = 8 * 1024;  // a barrier of a hardware cluster, and the loads behind it
constexpr int64_t kBarrierCost = 32 * 1024;        // the same of a virtual one
// Partials that every member may have to read before the join is divided among them.
constexpr int64_t kDivideAbove = 24 * 1024;
constexpr int64_t kPartialBytes = 3 * sizeof(double);
constexpr int64_t kMostRounds = 8;  // that are tried

// The first windows are the sample that the others are centred on (resident_forward.cuh), so they must be one.
constexpr int64_t kLeastKept = 16;  // one in so many
// As in plan_streaming.cpp.
constexpr int64_t kMaxWindowsPerThreadFloat64 = 128;

// The resident kernels count slabs, and a row's elements, in 32 bits, and may step past the last once.
constexpr int64_t kMaxSlabs = int64_t{1} << 30;
constexpr int64_t kMaxResidentRow = int64_t{1} << 30;

// Vectors of a packed row that are walked side by side, at least: runs of several cache lines.
constexpr int64_t kMinPackedLanes = 16;

int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

// How an array may be walked, and by how many threads.
struct Shape {
  Layout layout;
  int lanes;
  int block;
};

// Units of a chunk that a block takes at a time.
int64_t step_of(const Shape& shape) {
  return shape.layout == Layout::kChannelsFirst ? shape.block : shape.block / shape.lanes;
}

// The threads of a block that walks `units` units of each of `lanes` lanes.
Shape shape_of(Layout layout, int64_t lanes, int64_t units) {
  const int64_t rows = std::min(units, resident_threads(layout) / lanes);
  return {layout, static_cast<int>(lanes), static_cast<int>(round_up(lanes * rows, kPlanWarp))};
}

template <typename Visit>
void each_shape(const Problem& problem, bool aligned, const Visit& visit) {
  if (problem.channels_last()) {
    const int widest = widest_lanes(problem);
    visit(shape_of(Layout::kChannelsLast, widest, problem.outer));
    if (widest == kMaxLanes) visit(shape_of(Layout::kChannelsLast, widest / 2, problem.outer));
    return;
  }
  const int64_t units = slab_units(problem, Layout::kChannelsFirst, aligned);
  visit(shape_of(Layout::kChannelsFirst, 1, units));
  const int64_t vector = vector_elements(problem.dtype);
  if (!aligned || problem.inner < vector || problem.channels * problem.inner % vector != 0) return;
  // So many channels begin and end on a vector.
  const int64_t least = vector / std::gcd(vector, problem.inner);
  const int64_t most = std::min<int64_t>(kMaxSlabChannels<Layout::kPacked>, problem.channels);
  for (int64_t channels = least; channels <= most; channels += channels) {
    const int64_t lanes = channels * problem.inner / vector;
    if (lanes > kMaxPackedLanes) return;
    if (lanes < kMinPackedLanes && 2 * channels <= most) continue;
    visit(shape_of(Layout::kPacked, lanes, problem.outer));
  }
}

struct Room {
  int64_t multiprocessors;
  int64_t beside;       // blocks on each
  int64_t cooperating;  // blocks on the device at once, of a cooperative launch
  int kept;             // windows of each tensor that a thread of each can keep
};

Room room_for(const Shape& shape, Pass pass, const DeviceLimits& limits) {
  const int64_t threads = limits.max_threads_per_multiprocessor;
  // The kernels' registers are bounded so that kResidentBlocks of the largest blocks fit.
  const int64_t by_registers = kResidentBlocks * resident_threads(shape.layout) / shape.block;
  // So many that each keeps a tile.
  const int64_t tile = int64_t{kVectorBytes} * kResidentTile * shape.block * tensors_read(pass);
  const int64_t by_shared =
      limits.shared_per_multiprocessor / (limits.shared_reserved + resident_overhead(shape.layout) + tile);
  const int64_t beside = std::min<int64_t>(
      {by_registers, by_shared, threads / shape.block, int64_t{limits.max_blocks_per_multiprocessor}});
  if (beside == 0) return {};
  const int64_t shared =
      std::min(limits.shared_per_multiprocessor / beside - limits.shared_reserved, limits.shared_per_block) -
      resident_overhead(shape.layout);
  const int64_t windows = shared / (int64_t{kVectorBytes} * shape.block * tensors_read(pass));
  const int cooperating = limits.multiprocessors - limits.multiprocessors / kSparedOf;
  return {limits.multiprocessors, beside, beside * cooperating, static_cast<int>(std::max<int64_t>(0, windows))};
}

// Groups that run at a time. Those of one block, and hardware clusters, wait for no other and need spare nothing.
int64_t groups_at_once(const Room& room, Group group, int64_t members) {
  if (group == Group::kVirtualCluster) return std::min<int64_t>(room.cooperating / members, kMaxBarrierGroups);
  if (group == Group::kBlock) return room.multiprocessors * room.beside;
  const int64_t whole = room.multiprocessors / kClusterMultiprocessors;
  const int64_t rest = room.multiprocessors % kClusterMultiprocessors;
  return whole * (kClusterMultiprocessors * room.beside / members) + rest * room.beside / members;
}

// A row's first and last windows may be partly another's: half of each is the row's own, and is written element by element.
int64_t written_in_parts(const Problem& problem, Layout layout, bool aligned, const Walk& walk, int64_t windows) {
  const int vector = vector_elements(problem.dtype);
  if (layout != Layout::kChannelsFirst || (aligned && problem.inner % vector == 0)) return 0;
  return ceil_div(2 * windows, walk.windows.value) * (vector / 2);
}

struct Candidate {
  ResidentChoice choice;
  // Bytes that one of kResidentBlocks blocks beside each other could move in the time that the pass takes.
  int64_t cost;
};

Group group_of(int64_t members, bool cluster) {
  if (members == 1) return Group::kBlock;
  return cluster ? Group::kCluster : Group::kVirtualCluster;
}

// The choice with a given number of members; cost < 0: there is none.
Candidate candidate(const Problem& problem, Pass pass, bool aligned, const Shape& shape, const Room& room, bool cluster,
                    int64_t members) {
  const Walk walk = make_walk(problem, shape.layout, shape.lanes, aligned, shape.block, members);
  const Group group = group_of(walk.chunks, cluster);
  const int64_t windows = ceil_div(walk.chunk_size, step_of(shape));  // of a thread
  const int64_t kept = std::min<int64_t>(windows, room.kept);
  if (kept * kLeastKept < windows) return {{}, -1};
  if (walk.slabs.value > kMaxSlabs || problem.inner > kMaxResidentRow) return {{}, -1};
  if (problem.dtype == Dtype::kFloat64 && windows > kMaxWindowsPerThreadFloat64) return {{}, -1};
  const int64_t groups = std::min(groups_at_once(room, group, walk.chunks), walk.slabs.value);
  if (groups == 0) return {{}, -1};
  const int64_t rounds = ceil_div(walk.slabs.value, groups);
  const int64_t joined = walk.chunks * walk.slab_channels * kPartialBytes;
  const bool divided = group == Group::kVirtualCluster && joined > kDivideAbove;
  const int64_t tensors = tensors_read(pass);
  const int64_t moved = (tensors + 1) * windows + tensors * std::max<int64_t>(0, windows - kept) +
                        written_in_parts(problem, shape.layout, aligned, walk, windows);
  int64_t waited = kRoundCost;
  if (group == Group::kCluster) waited += kClusterBarrierCost + joined;
  if (group == Group::kVirtualCluster) waited += kBarrierCost + (divided ? kBarrierCost : joined);
  const ResidentChoice choice{
      shape.layout,           shape.lanes, shape.block, static_cast<int>(walk.chunks), static_cast<int>(groups),
      static_cast<int>(kept), divided,     cluster};
  // The more blocks share a multiprocessor, the longer each takes.
  return {choice, rounds * (moved * kVectorBytes * shape.block * room.beside / kResidentBlocks + waited)};
}

// Of all shapes and numbers of members, the cheapest.
Candidate cheapest(const Problem& problem, Pass pass, bool aligned, const DeviceLimits& limits) {
  Candidate best{{}, -1};
  each_shape(problem, aligned, [&](const Shape& shape) {
    const Room room = room_for(shape, pass, limits);
    if (room.kept == 0) return;
    const int64_t units = slab_units(problem, shape.layout, aligned);
    const int64_t slabs = make_walk(problem, shape.layout, shape.lanes, aligned, shape.block, 1).slabs.value;
    const auto consider = [&](int64_t members, bool cluster = false) {
      const Candidate one = candidate(problem, pass, aligned, shape, room, cluster, members);
      if (one.cost >= 0 && (best.cost < 0 || one.cost < best.cost)) best = one;
    };
    const int64_t shares = ceil_div(units, step_of(shape));  // at most
    // So few keep all of it.
    const int64_t enough = ceil_div(units, room.kept * step_of(shape));
    // A hardware cluster keeps all of it, or is as large as can be where there is no larger group.
    const int64_t most_in_cluster = std::min<int64_t>(limits.max_cluster, shares);
    const int64_t least_in_cluster = limits.cooperative_launch ? enough : std::min(enough, most_in_cluster);
    for (int64_t members = std::max<int64_t>(2, least_in_cluster); members <= most_in_cluster; ++members) {
      consider(members, true);
    }
    const int64_t most = limits.cooperative_launch ? std::min(room.cooperating, shares) : 1;
    // If none keep all of it, as many as there are keep the most.
    const int64_t least = std::min(enough, most);
    consider(least);
    // As many groups as these are, of all the blocks that there are.
    const int64_t groups = std::min(room.cooperating / least, slabs);
    if (groups > 0) consider(std::min(room.cooperating / groups, most));
    for (int64_t rounds = 1; rounds <= std::min(slabs, kMostRounds); ++rounds) {
      const int64_t members = std::min(room.cooperating / std::min(room.cooperating, ceil_div(slabs, rounds)), most);
      if (members > least) consider(members);
    }
  });
  return best;
}

// Of a channel of each tensor, in bytes: what no member keeps.
int64_t read_again(const Problem& problem, const ResidentPlan& plan, int64_t units) {
  const Shape shape{plan.walk.layout, plan.walk.lanes, plan.launch.block};
  const int64_t kept = plan.kept * step_of(shape);
  const int64_t last = units - (plan.walk.chunks - 1) * plan.walk.chunk_size;
  const int64_t again =
      (plan.walk.chunks - 1) * std::max<int64_t>(0, plan.walk.chunk_size - kept) + std::max<int64_t>(0, last - kept);
  // A unit is a row, or a window, which has its part of a row. Neighbouring windows of rows that begin and end within a
  // vector share that vector: counted whole, short rows would be read many times over.
  const int64_t row_bytes = problem.inner * size_of(problem.dtype);
  return shape.layout == Layout::kChannelsFirst ? again * row_bytes / plan.walk.windows.value : again * row_bytes;
}

Traffic exchanged_by(const ResidentPlan& plan, Pass pass) {
  if (plan.group != Group::kVirtualCluster) return {0, 0};
  const bool forward = pass == Pass::kForwardTrain;
  const int64_t bytes = plan.walk.channels * static_cast<int64_t>(sizeof(double));
  const int64_t partials = (forward ? 3 : 2) * bytes * plan.members;
  if (!plan.divided) return {partials * plan.members, partials};
  // Who has joined a channel tells the others two values; those of the forward are its results.
  return forward ? Traffic{partials, partials} : Traffic{partials + 2 * bytes * plan.members, partials + 2 * bytes};
}

}  // namespace

ResidentPlan make_resident(const Problem& problem, bool aligned, Pass pass, const ResidentChoice& choice) {
  ResidentPlan plan{};
  plan.walk = make_walk(problem, choice.layout, choice.lanes, aligned, choice.block, choice.members);
  plan.members = static_cast<int>(plan.walk.chunks);
  plan.group = group_of(plan.members, choice.cluster);
  plan.groups = static_cast<int>(std::min<int64_t>(choice.groups, plan.walk.slabs.value));
  plan.kept = choice.kept;
  plan.launch = {int64_t{plan.groups} * plan.members, choice.block};
  plan.shared_bytes = int64_t{kVectorBytes} * choice.block * choice.kept * tensors_read(pass);
  plan.divided = choice.divided && plan.group == Group::kVirtualCluster;
  const int64_t joined = plan.divided ? ceil_div(plan.walk.slab_channels, plan.members) : plan.walk.slab_channels;
  plan.join_lanes = join_lanes(joined, plan.members);
  return plan;
}

Plan plan_pass(const Problem& problem, Pass pass, bool aligned, const DeviceLimits& limits,
               const PlanOptions& options) {
  Plan plan{};
  plan.streaming = plan_streaming(problem, aligned, limits);
  const int64_t tensor = problem.elements() * size_of(problem.dtype);
  const int64_t read = tensors_read(pass) * tensor;
  const bool training = pass == Pass::kForwardTrain || pass == Pass::kBackwardTrain;
  const bool reads_x = pass != Pass::kBackwardEval;
  plan.floor = {read, tensor};
  plan.predicted = {training ? 2 * read : reads_x ? read : read + tensor, tensor};

  const Candidate best = training ? cheapest(problem, pass, aligned, limits) : Candidate{{}, -1};
  plan.reason = !training                   ? Reason::kNoReduction
                : options.force_streaming   ? Reason::kForced
                : best.cost >= 0            ? Reason::kNone
                : limits.cooperative_launch ? Reason::kNotResident
                                            : Reason::kNoCooperation;
  if (plan.reason != Reason::kNone) return plan;
  plan.path = Path::kResident;
  plan.resident = make_resident(problem, aligned, pass, best.choice);
  const int64_t again = read_again(problem, plan.resident, slab_units(problem, best.choice.layout, aligned));
  plan.predicted = {read + tensors_read(pass) * again * problem.channels, tensor};
  plan.exchanged = exchanged_by(plan.resident, pass);
  return plan;
}

}  // namespace bnk
