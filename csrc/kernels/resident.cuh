// What the resident kernels share: groups of blocks, the windows that a block keeps on chip, and the exchange within a
// group (ResidentPlan, in plan.h).
#pragma once

#include "moments.cuh"
#include "partials.cuh"
#include "slab_reduce.cuh"

namespace bnk {

// Windows that a thread sums in the elements' compute type before the block goes on in double, behind those it keeps.
inline constexpr int kChainWindows = 64;

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
inline constexpr int kJoinLanes = kLayout == Layout::kChannelsFirst ? 1 : kWarpThreads;  // at most
template <Layout kLayout>
inline constexpr int kJoinSlots = kFields<Moments> * kReduceSlots<1, kJoinLanes<kLayout>>;
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

// Finite floats may have a sum, and products have it soon, that is not finite. A thread sums those again, in units so large that
// it cannot happen; in double, what it tells its block is scaled back. Only those: the sums of its other elements may be of
// other channels, whose values are nothing in such units.
template <typename Real>
inline constexpr Real kRescue = sizeof(Real) == 4 ? Real(0x1p-80) : Real(1);

// Two sums for each element of a window.
template <typename T>
struct WindowSums {
  using Real = Compute<T>;
  static constexpr int kElements = kVectorElements<T>;
  Real first[kElements];
  Real second[kElements];
  unsigned rescued;  // a bit for each element: its sums are in units of 1 / kRescue and of that squared

  BNK_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kElements; ++i) first[i] = second[i] = 0;
    rescued = 0;
  }

  // Clears what is not finite, to be summed again. False: nothing is.
  BNK_DEVICE bool needs_rescue() {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const bool finite = is_finite(first[i]) && is_finite(second[i]);
      first[i] = finite ? first[i] : 0;
      second[i] = finite ? second[i] : 0;
      rescued |= finite ? 0 : 1u << i;
    }
    return rescued != 0;
  }

  BNK_DEVICE bool is_rescued(int element) const { return (rescued >> element & 1u) != 0; }

  BNK_DEVICE Sums operator()(int element) const {
    const double unit = is_rescued(element) ? 1 / static_cast<double>(kRescue<Real>) : 1;
    return {static_cast<double>(first[element]) * unit, static_cast<double>(second[element]) * unit * unit};
  }
};

// The first windows of each thread, of one tensor, in shared memory. A thread reads back only what it wrote: no barrier.
template <typename T>
struct Kept {
  Vector<T>* slots;

  BNK_DEVICE Vector<T>& operator[](int window) const {
    return slots[window * static_cast<int>(block_threads()) + static_cast<int>(thread_rank())];
  }
};

// A tile of kept windows: the `count` first of those from `window` on.
template <typename T, int kTile>
BNK_DEVICE void fetch_tile(const Kept<T>& kept, int window, int count, Vector<T> (&bits)[kTile]) {
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    if (i < count) bits[i] = kept[window + i];
  }
}

template <typename T, int kTile>
BNK_DEVICE void keep_tile(const Kept<T>& kept, int window, int count, const Vector<T> (&bits)[kTile]) {
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    if (i < count) kept[window + i] = bits[i];
  }
}

// Visits a thread's windows tile by tile: those not kept first, the last of them before the others, as what was read last is
// likeliest still in L2. Calls visit(windows, first, kept): a tile's windows, the number of the first, and how many of
// them are kept: 0, or all that are there.
template <int kTile, typename Walker, typename Visit>
BNK_DEVICE void visit_again(Walker& walker, int kept, const Visit& visit) {
  Window windows[kTile];
  for (int tile = (walker.windows() - kept + kTile - 1) / kTile; tile-- > 0;) {
    walker.seek(kept + tile * kTile);
    next_tile(walker, windows);
    visit(windows, kept + tile * kTile, 0);
  }
  walker.seek(0);
  for (int first = 0; first < kept && walker.more(); first += kTile) {
    next_tile(walker, windows, kept - first);
    visit(windows, first, kept - first);
  }
}

// Channels of a slab; the last one may have fewer.
BNK_DEVICE int channels_of(const Walk& walk, int slab) {
  const int64_t rest = walk.channels - int64_t{slab} * walk.slab_channels;
  return rest < walk.slab_channels ? static_cast<int>(rest) : walk.slab_channels;
}

// Sums a share, chain by chain: of the windows that a thread keeps first, then of kChainWindows at a time. sum(first, count)
// sums the thread's windows from `first` on, at(element) are the sums; those of the block, of all chains, are added up in
// totals[local], and are there for all when it returns.
template <typename T, Layout kLayout, typename Sum, typename At>
BNK_DEVICE void sum_share(const Walk& walk, Walker<T, kLayout>& walker, int slab, int kept, Sums* slots, Sums* totals,
                          const Sum& sum, const At& at) {
  const int all = walker.most_windows();
  int count = kept;
  for (int first = 0; first < all; first += count) {
    if (first > 0) count = kChainWindows;
    sum(first, count);
    reduce_slab<T>(walk, walker, slab, at, slots, [&](int local, const Sums& joined) {
      if (first == 0) totals[local] = {};
      join(totals[local], joined);
    });
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
BNK_DEVICE void exchange(const Residence& residence, const Walk& walk, const Member& member, int slab,
                         Accumulator* slots, const Finish_& finish, const Recall& recall) {
  const int64_t first = int64_t{slab} * walk.slab_channels;
  const int channels = channels_of(walk, slab);
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
