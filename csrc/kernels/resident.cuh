// What the resident kernels share: groups of blocks, the windows that a block keeps on chip, and the exchange within a
// group (ResidentPlan, in plan.h).
#pragma once

#include "moments.cuh"
#include "partials.cuh"
#include "slab_reduce.cuh"

namespace bnk {

// Windows that a thread has in flight where it cannot keep them: fewer, as its sums in double take registers.
inline constexpr int kSpilledTile = 2;

// A counter to each group, and one for the launch; each in a memory sector of its own, all 0 but for their top bits before
// a launch and after it.
inline constexpr int kCounterStride = 8;

struct Residence {
  int members;
  int groups;
  int kept;
  bool divided;
  int join_lanes;
  double* partial;     // where there are several members: partials.cuh
  unsigned* counters;  // the groups', then the launch's
};

// Shared memory of all of a resident kernel's reductions, in doubles: of a slab's sums, and of a group's moments.
template <typename T, Layout kLayout>
inline constexpr int kSumSlots = kFields<Sums> * kSlabSlots<T, kLayout>;
template <Layout kLayout>
inline constexpr int kJoinSlots = kFields<Moments> * kReduceSlots < 1,
                     kLayout == Layout::kChannelsFirst ? 1 : kWarpThreads > ;
template <typename T, Layout kLayout>
inline constexpr int kResidentSlots =
    kSumSlots<T, kLayout> > kJoinSlots<kLayout> ? kSumSlots<T, kLayout> : kJoinSlots<kLayout>;

template <typename Accumulator>
BNK_DEVICE Accumulator* slots_of(double* slots) {
  return reinterpret_cast<Accumulator*>(slots);
}

// This block's place.
struct Member {
  int group;
  int rank;
};

BNK_DEVICE Member member_of(const Residence& residence) {
  const int block = static_cast<int>(block_rank());
  return {block / residence.members, block % residence.members};
}

BNK_DEVICE unsigned* counter_of(const Residence& residence, int group) {
  return residence.counters + group * kCounterStride;
}

// True in one thread of the launch, of the last block to come here: when no other thread will read what it read before a
// barrier of its block.
BNK_DEVICE bool last_of_launch(const Residence& residence) {
  return thread_rank() == 0 && last_to_arrive(counter_of(residence, residence.groups), grid_blocks());
}

// The first windows of each thread, of one tensor, in shared memory. A thread reads back only what it wrote: no barrier.
template <typename T>
struct Kept {
  Vector<T>* slots;

  BNK_DEVICE Vector<T>& operator[](int window) const {
    return slots[window * static_cast<int>(block_threads()) + static_cast<int>(thread_rank())];
  }
};

// A tile of kept windows, `window` the first of them.
template <typename T, int kTile>
BNK_DEVICE void fetch_tile(const Kept<T>& kept, int window, Vector<T> (&bits)[kTile]) {
#pragma unroll
  for (int i = 0; i < kTile; ++i) bits[i] = kept[window + i];
}

template <typename T, int kTile>
BNK_DEVICE void keep_tile(const Kept<T>& kept, int window, const Vector<T> (&bits)[kTile]) {
#pragma unroll
  for (int i = 0; i < kTile; ++i) kept[window + i] = bits[i];
}

template <typename Real, int kCount>
BNK_DEVICE bool all_finite(const Real (&values)[kCount]) {
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kCount; ++i) finite &= is_finite(values[i]);
  return finite;
}

// Visits a thread's windows last tile first: what was read last, and is not kept, is then likeliest still in L2. Calls
// visit(windows, first, kept): a tile's windows, the number of the first, and whether they are kept.
template <int kTile, typename Walker, typename Visit>
BNK_DEVICE void visit_reversed(Walker& walker, int kept, const Visit& visit) {
  for (int tile = (walker.windows() + kTile - 1) / kTile; tile-- > 0;) {
    Window windows[kTile];
    walker.seek(int64_t{tile} * kTile);
    next_tile(walker, windows);
    visit(windows, tile * kTile, tile * kTile < kept);
  }
}

// What the members of a group found of a slab's channels becomes known to all. A block has stored its partials of the slab;
// then finish(local, joined) is called for its channels, from one thread each, in one of two ways:
//
//   each for itself   by every member for all channels
//   divided           by one member for each channel; finish leaves its results in global memory, and recall(local) is
//                     called by every member, from one thread for each channel, to read them
//
// What either wrote to shared memory is there for the block when it returns.
template <typename Accumulator, typename Finish_, typename Recall>
BNK_DEVICE void exchange(const Residence& residence, const Walk& walk, const Member& member, int64_t slab,
                         Accumulator* slots, const Finish_& finish, const Recall& recall) {
  const int64_t first = slab * walk.slab_channels;
  const int64_t rest = walk.channels - first;
  const int channels = rest < walk.slab_channels ? static_cast<int>(rest) : walk.slab_channels;
  const Finish partials{walk.channels, walk.chunks, residence.join_lanes};
  unsigned* counter = counter_of(residence, member.group);
  group_barrier(counter, residence.members, member.rank);  // every member's partials are stored before they are read
  const int worker = residence.divided ? member.rank : 0;
  const int workers = residence.divided ? residence.members : 1;
  join_channels(partials, residence.partial, first, channels, worker, workers, slots, finish);
  if (!residence.divided) return;
  group_barrier(counter, residence.members, member.rank);  // every channel's results are stored before they are read
  for (int local = thread_rank(); local < channels; local += block_threads()) recall(local);
  block_barrier();  // what recall wrote to shared memory is there for all
}

}  // namespace bnk
