// What the resident kernels share: groups of blocks, the windows that a block keeps on chip, and the exchange within a
// group (ResidentPlan, in plan.h).
#pragma once

#include <type_traits>

#include "moments.cuh"
#include "partials.cuh"
#include "slab_reduce.cuh"
#include "tiles.cuh"

namespace bnk {

// Windows that a thread sums in the elements' compute type before the block goes on in double, behind those it keeps.
inline constexpr int kChainWindows = 64;

// A word of the barrier workspace (plan.h). Its meaning never changes, so that a launch finds it in one state, whatever
// ran before:
//
//   word 0        last_to_arrive of a launch: 0 between launches
//   word 1 + g    group_barrier of group g: 0 but for its top bit between launches
struct alignas(kBarrierWordBytes) BarrierWord {
  unsigned value;
};

struct Residence {
  Group group;
  int members;
  int groups;
  int kept;
  bool divided;
  int join_lanes;
  double* partial;             // of a virtual cluster: partials.cuh
  BarrierWord* barrier_words;  // null if the launch uses none
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

// Slabs whose partials a member of a hardware cluster holds: one that others may still read, and the next.
inline constexpr int kToldSlabs = 2;

// A plan that keeps a part of each row on chip counts rows in 32 bits (kMaxResidentRow, in plan_resident.cpp).
template <typename T, Layout kLayout>
using ResidentWalker = Walker<T, kLayout, int>;

// This block's place.
struct Member {
  int group;
  int rank;
};

BNK_DEVICE Member member_of(const Residence& residence) {
  const int block = static_cast<int>(block_rank());
  return {block / residence.members, block % residence.members};
}

// True in one thread of the launch, of the last block to come here: when no other thread will read what it read before a
// barrier of its block.
BNK_DEVICE bool last_of_launch(const Residence& residence) {
  return thread_rank() == 0 && last_to_arrive(&residence.barrier_words[0].value, grid_blocks());
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

// A tile of kept windows, of which `first` is the first.
template <typename T, typename Window_, int kTile>
BNK_DEVICE void fetch_tile(const Kept<T>& kept, const Window_ (&windows)[kTile], int first, Vector<T> (&bits)[kTile]) {
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    if (windows[i].size() > 0) bits[i] = kept[first + i];
  }
}

template <typename T, typename Window_, int kTile>
BNK_DEVICE void keep_tile(const Kept<T>& kept, const Window_ (&windows)[kTile], int first,
                          const Vector<T> (&bits)[kTile]) {
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    if (windows[i].size() > 0) kept[first + i] = bits[i];
  }
}

// Visits a thread's windows tile by tile (visit_tiles): those not kept first, the last of them before the others, as what was
// read last is likeliest still in L2. Calls visit(windows, number, is_kept), where is_kept.value is a constant.
template <int kTile, typename Walker, typename Visit>
BNK_DEVICE void visit_again(Walker& walker, int kept, bool whole, const Visit& visit) {
  const auto again = [&](const auto& windows, int first) { visit(windows, first, std::false_type{}); };
#pragma unroll 1
  for (int tile = (walker.windows() - kept + kTile - 1) / kTile; tile-- > 0;) {
    const int first = kept + tile * kTile;
    walker.seek(first);
    if (whole && has_tile<kTile>(walker, first)) {
      auto way = walker.whole();
      visit_whole<kTile, typename Walker::Element>(way, first, again);
    } else {
      visit_any<kTile>(walker, first, kTile, again);
    }
  }
  visit_tiles<kTile>(walker, 0, kept, whole,
                     [&](const auto& windows, int first) { visit(windows, first, std::true_type{}); });
}

BNK_DEVICE int64_t first_channel(const Walk& walk, int slab) { return int64_t{slab} * walk.slab_channels; }

// Channels of a slab; the last one may have fewer.
BNK_DEVICE int channels_of(const Walk& walk, int slab) {
  const int64_t rest = walk.channels - first_channel(walk, slab);
  return rest < walk.slab_channels ? static_cast<int>(rest) : walk.slab_channels;
}

// Sums a share, chain by chain: of the windows that a thread keeps first, then of kChainWindows at a time. sum(first, count)
// sums the thread's windows from `first` on, at(element) are the sums; those of the block, of all chains, are added up in
// totals[local], and are there for all when it returns.
template <typename T, Layout kLayout, typename Sum, typename At>
BNK_DEVICE void sum_share(const Walk& walk, ResidentWalker<T, kLayout>& walker, int slab, int kept, Sums* slots,
                          Sums* totals, const Sum& sum, const At& at) {
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

// What the members of a group found of a slab's channels becomes known to all. mine(local) is what this block found of a
// channel; finish(local, joined) is called with what all of them did, from one thread for each channel, in one of two ways:
//
//   each for itself   by every member for all channels
//   divided           by one member for each channel; finish leaves its results in global memory, and recall(local) is
//                     called by every member, from one thread for each channel, to read them
//
// What either wrote to shared memory is there for the block when it returns. There are two bodies of it.

// What a member has told. `told` is this block's own: in every member's shared memory it lies in the same place.
template <typename Accumulator>
BNK_DEVICE Accumulator told_by(int rank, const Accumulator* told) {
  Accumulator result;
  double* fields = reinterpret_cast<double*>(&result);
#pragma unroll
  for (int field = 0; field < kFields<Accumulator>; ++field) {
    fields[field] = load_member(reinterpret_cast<const double*>(told) + field, rank);
  }
  return result;
}

// A block alone, or in a hardware cluster: told[local] is where it tells the others. They may read it until they come to the
// next barrier of the cluster, so that the next slab must be told elsewhere.
template <typename Accumulator, typename Mine, typename Finish_>
BNK_DEVICE void exchange_on_chip(const Residence& residence, int channels, Accumulator* told, const Mine& mine,
                                 const Finish_& finish) {
  for (int local = thread_rank(); local < channels; local += block_threads()) told[local] = mine(local);
  if (residence.group == Group::kCluster) cluster_barrier();  // every member has told before the others read
  for (int local = thread_rank(); local < channels; local += block_threads()) {
    Accumulator all{};
    for (int rank = 0; rank < residence.members; ++rank) join(all, told_by(rank, told + local));
    finish(local, all);
  }
  block_barrier();  // what finish wrote to shared memory is there for all
}

// In a virtual cluster: partials.cuh.
template <typename Accumulator, typename Mine, typename Finish_, typename Recall>
BNK_DEVICE void exchange_in_memory(const Residence& residence, const Walk& walk, const Member& member, int slab,
                                   Accumulator* slots, const Mine& mine, const Finish_& finish, const Recall& recall) {
  const int64_t first = first_channel(walk, slab);
  const int channels = channels_of(walk, slab);
  const Finish partials{walk.channels, walk.chunks, residence.join_lanes};
  unsigned* counter = &residence.barrier_words[1 + member.group].value;
  for (int local = thread_rank(); local < channels; local += block_threads()) {
    store_partial(residence.partial, walk, member.rank, first + local, mine(local));
  }
  group_barrier(counter, residence.members, member.rank);  // every member's partials are stored before they are read
  const int worker = residence.divided ? member.rank : 0;
  const int workers = residence.divided ? residence.members : 1;
  join_channels(partials, residence.partial, first, channels, worker, workers, slots, finish);
  if (!residence.divided) return;
  group_barrier(counter, residence.members, member.rank);  // every channel's results are stored before they are read
  for (int local = thread_rank(); local < channels; local += block_threads()) recall(local);
  block_barrier();  // what recall wrote to shared memory is there for all
}

// told: kToldSlabs * kMaxSlabChannels of shared memory, which a group's slabs take in turn.
template <Layout kLayout, typename Accumulator, typename Mine, typename Finish_, typename Recall>
BNK_DEVICE void exchange(const Residence& residence, const Walk& walk, const Member& member, int slab,
                         Accumulator* told, Accumulator* slots, const Mine& mine, const Finish_& finish,
                         const Recall& recall) {
  if (residence.group == Group::kVirtualCluster) {
    exchange_in_memory(residence, walk, member, slab, slots, mine, finish, recall);
  } else {
    const int turn = slab / residence.groups % kToldSlabs;
    exchange_on_chip(residence, channels_of(walk, slab), told + turn * kMaxSlabChannels<kLayout>, mine, finish);
  }
}

// Before a block ends.
BNK_DEVICE void leave(const Residence& residence) {
  if (residence.group == Group::kCluster) cluster_barrier();  // what this block told is read before its memory goes
}

}  // namespace bnk
