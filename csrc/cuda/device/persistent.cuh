// What the persistent kernels share: groups of blocks, the vectors that a block keeps on chip, and the exchange within a
// group (PersistentPlan, in plan.h).
#pragma once

#include <type_traits>

#include "channel_tile_reduce.cuh"
#include "partials.cuh"
#include "visit_vectors.cuh"
#include "welford.cuh"

namespace bnk {

// Windows that a thread sums in the elements' compute type before the block goes on in double, behind those it keeps.
inline constexpr int kChainVectors = 64;

// A word of the barrier workspace (plan.h). Its meaning never changes, so that a launch finds it in one state, whatever
// ran before:
//
//   word 0        last_to_arrive of a launch: 0 between launches
//   word 1 + g    group_barrier of group g: 0 but for its top bit between launches
struct alignas(kBarrierWordBytes) BarrierWord {
  unsigned value;
};

struct PersistentParams {
  GroupKind group;
  int group_size;
  int groups;
  int cached_vectors;
  bool two_shot;
  int combine_threads_c;
  double* partial;             // of a grid group: partials.cuh
  BarrierWord* barrier_words;  // null if the launch uses none
};

// Shared memory of all of a persistent kernel's reductions, in doubles: of a channel tile's sums, and of a group's Welford data.
template <typename T, Layout kLayout>
inline constexpr int kSumSlots = kFields<Sums> * kChannelTileSlots<T, kLayout>;
template <Layout kLayout>
inline constexpr int kCombineThreadsC = kLayout == Layout::kChannelsFirst ? 1 : kWarpThreads;  // at most
template <Layout kLayout>
inline constexpr int kCombineSlots = kFields<WelfordData> * kReduceSlots<1, kCombineThreadsC<kLayout>>;
template <typename T, Layout kLayout>
inline constexpr int kPersistentSlots =
    kSumSlots<T, kLayout> > kCombineSlots<kLayout> ? kSumSlots<T, kLayout> : kCombineSlots<kLayout>;

template <typename Accumulator>
BNK_DEVICE Accumulator* slots_of(double* slots) {
  return reinterpret_cast<Accumulator*>(slots);
}

// Channel tiles whose partials a member of a cluster holds: one that others may still read, and the next.
inline constexpr int kPartialBuffers = 2;

// A plan that keeps a part of each row on chip counts rows in 32 bits (kMaxPersistentRow, in plan_persistent.cpp).
template <typename T, Layout kLayout>
using PersistentTileIterator = TileIterator<T, kLayout, int>;

// This block's place.
struct CtaCoord {
  int group;
  int rank;
};

BNK_DEVICE CtaCoord cta_coord(const PersistentParams& persistent) {
  const int block = static_cast<int>(block_rank());
  return {block / persistent.group_size, block % persistent.group_size};
}

// True in one thread of the launch, of the last block to come here: when no other thread will read what it read before a
// barrier of its block.
BNK_DEVICE bool last_of_launch(const PersistentParams& persistent) {
  return thread_rank() == 0 && last_to_arrive(&persistent.barrier_words[0].value, grid_blocks());
}

// Finite floats may have a sum, and products have it soon, that is not finite. A thread sums those again, in units so large that
// it cannot happen; in double, what it tells its block is scaled back. Only those: the sums of its other elements may be of
// other channels, whose values are nothing in such units.
template <typename opmath_t>
inline constexpr opmath_t kOverflowScale = sizeof(opmath_t) == 4 ? opmath_t(0x1p-80) : opmath_t(1);

// Two sums for each element of a vector.
template <typename T>
struct ElementSums {
  using opmath_t = opmath_type<T>;
  static constexpr int kElements = kVectorElements<T>;
  opmath_t first[kElements];
  opmath_t second[kElements];
  unsigned rescaled;  // a bit for each element: its sums are in units of 1 / kOverflowScale and of that squared

  BNK_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kElements; ++i) first[i] = second[i] = 0;
    rescaled = 0;
  }

  // Clears what is not finite, to be summed again. False: nothing is.
  BNK_DEVICE bool needs_rescale() {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const bool finite = is_finite(first[i]) && is_finite(second[i]);
      first[i] = finite ? first[i] : 0;
      second[i] = finite ? second[i] : 0;
      rescaled |= finite ? 0 : 1u << i;
    }
    return rescaled != 0;
  }

  BNK_DEVICE bool is_rescaled(int element) const { return (rescaled >> element & 1u) != 0; }

  BNK_DEVICE Sums operator()(int element) const {
    const double unit = is_rescaled(element) ? 1 / static_cast<double>(kOverflowScale<opmath_t>) : 1;
    return {static_cast<double>(first[element]) * unit, static_cast<double>(second[element]) * unit * unit};
  }
};

// The first vectors of each thread, of one tensor, in shared memory. A thread reads back only what it wrote: no barrier.
template <typename T>
struct SmemCache {
  Vector<T>* slots;

  BNK_DEVICE Vector<T>& operator[](int vector) const {
    return slots[vector * static_cast<int>(block_threads()) + static_cast<int>(thread_rank())];
  }
};

// A tile of kept vectors, of which `first` is the first.
template <typename T, typename Access, int kVectors>
BNK_DEVICE void load_cached(const SmemCache<T>& cache, const Access (&accesses)[kVectors], int first,
                            Vector<T> (&bits)[kVectors]) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (accesses[i].size() > 0) bits[i] = cache[first + i];
  }
}

template <typename T, typename Access, int kVectors>
BNK_DEVICE void cache_vectors(const SmemCache<T>& cache, const Access (&accesses)[kVectors], int first,
                              const Vector<T> (&bits)[kVectors]) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (accesses[i].size() > 0) cache[first + i] = bits[i];
  }
}

// Visits a thread's vectors tile by tile (visit_vectors): those not kept first, the last of them before the others, as what was
// read last is likeliest still in L2. Calls visit(vectors, number, is_cached), where is_cached.value is a constant.
template <int kVectors, typename Iterator, typename Visit>
BNK_DEVICE void revisit_vectors(Iterator& iterator, int cached_vectors, bool whole, const Visit& visit) {
  const auto again = [&](const auto& accesses, int first) { visit(accesses, first, std::false_type{}); };
#pragma unroll 1
  for (int tile = (iterator.vectors() - cached_vectors + kVectors - 1) / kVectors; tile-- > 0;) {
    const int first = cached_vectors + tile * kVectors;
    iterator.seek(first);
    if (whole && has_vectors<kVectors>(iterator, first)) {
      auto way = iterator.whole();
      visit_full<kVectors, typename Iterator::Element>(way, first, again);
    } else {
      visit_any<kVectors>(iterator, first, kVectors, again);
    }
  }
  visit_vectors<kVectors>(iterator, 0, cached_vectors, whole,
                          [&](const auto& accesses, int first) { visit(accesses, first, std::true_type{}); });
}

BNK_DEVICE int64_t first_channel(const TilePartition& partition, int channel_tile) {
  return int64_t{channel_tile} * partition.tile_channels;
}

// Channels of a channel tile; the last one may have fewer.
BNK_DEVICE int channels_of(const TilePartition& partition, int channel_tile) {
  const int64_t rest = partition.channels - first_channel(partition, channel_tile);
  return rest < partition.tile_channels ? static_cast<int>(rest) : partition.tile_channels;
}

// Sums a share, chain by chain: of the vectors that a thread keeps first, then of kChainVectors at a time. sum(first, count)
// sums the thread's vectors from `first` on, at(element) are the sums; those of the block, of all chains, are added up in
// totals[local], and are there for all when it returns.
template <typename T, Layout kLayout, typename Sum, typename At>
BNK_DEVICE void sum_work_tile(const TilePartition& partition, PersistentTileIterator<T, kLayout>& iterator,
                              int channel_tile, int cached_vectors, Sums* slots, Sums* totals, const Sum& sum,
                              const At& at) {
  const int all = iterator.max_vectors();
  int count = cached_vectors;
  for (int first = 0; first < all; first += count) {
    if (first > 0) count = kChainVectors;
    sum(first, count);
    reduce_channel_tile<T>(partition, iterator, channel_tile, at, slots, [&](int local, const Sums& combined) {
      if (first == 0) totals[local] = {};
      combine(totals[local], combined);
    });
  }
}

// What the members of a group found of a channel tile's channels becomes known to all. mine(local) is what this block found of a
// channel; finish(local, joined) is called with what all of them did, from one thread for each channel, in one of two ways:
//
//   each for itself   by every member for all channels
//   divided           by one member for each channel; finish leaves its results in global memory, and recall(local) is
//                     called by every member, from one thread for each channel, to read them
//
// What either wrote to shared memory is there for the block when it returns. There are two bodies of it.

// What a member has told. `told` is this block's own: in every member's shared memory it lies in the same place.
template <typename Accumulator>
BNK_DEVICE Accumulator peer_partial(int rank, const Accumulator* partials) {
  Accumulator result;
  double* fields = reinterpret_cast<double*>(&result);
#pragma unroll
  for (int field = 0; field < kFields<Accumulator>; ++field) {
    fields[field] = load_dsmem(reinterpret_cast<const double*>(partials) + field, rank);
  }
  return result;
}

// A block alone, or in a cluster: told[local] is where it tells the others. They may read it until they come to the
// next barrier of the cluster, so that the next channel tile must be told elsewhere.
template <typename Accumulator, typename LocalPartial, typename OnReduced>
BNK_DEVICE void exchange_on_chip(const PersistentParams& persistent, int channels, Accumulator* partials,
                                 const LocalPartial& local_partial, const OnReduced& on_reduced) {
  for (int local = thread_rank(); local < channels; local += block_threads()) partials[local] = local_partial(local);
  if (persistent.group == GroupKind::kCluster) cluster_barrier();  // every member has told before the others read
  for (int local = thread_rank(); local < channels; local += block_threads()) {
    Accumulator all{};
    for (int rank = 0; rank < persistent.group_size; ++rank) combine(all, peer_partial(rank, partials + local));
    on_reduced(local, all);
  }
  block_barrier();  // what finish wrote to shared memory is there for all
}

// In a grid group: partials.cuh.
template <typename Accumulator, typename LocalPartial, typename OnReduced, typename Reload>
BNK_DEVICE void exchange_in_memory(const PersistentParams& persistent, const TilePartition& partition,
                                   const CtaCoord& cta, int channel_tile, Accumulator* slots,
                                   const LocalPartial& local_partial, const OnReduced& on_reduced,
                                   const Reload& reload) {
  const int64_t first = first_channel(partition, channel_tile);
  const int channels = channels_of(partition, channel_tile);
  const Finalize partials{partition.channels, partition.splits, persistent.combine_threads_c};
  unsigned* counter = &persistent.barrier_words[1 + cta.group].value;
  for (int local = thread_rank(); local < channels; local += block_threads()) {
    store_partial(persistent.partial, partition, cta.rank, first + local, local_partial(local));
  }
  group_barrier(counter, persistent.group_size, cta.rank);  // every member's partials are stored before they are read
  const int worker = persistent.two_shot ? cta.rank : 0;
  const int workers = persistent.two_shot ? persistent.group_size : 1;
  combine_channels(partials, persistent.partial, first, channels, worker, workers, slots, on_reduced);
  if (!persistent.two_shot) return;
  group_barrier(counter, persistent.group_size, cta.rank);  // every channel's results are stored before they are read
  for (int local = thread_rank(); local < channels; local += block_threads()) reload(local);
  block_barrier();  // what recall wrote to shared memory is there for all
}

// told: kPartialBuffers * kMaxTileChannels of shared memory, which a group's channel tiles take in turn.
template <Layout kLayout, typename Accumulator, typename LocalPartial, typename OnReduced, typename Reload>
BNK_DEVICE void exchange(const PersistentParams& persistent, const TilePartition& partition, const CtaCoord& cta,
                         int channel_tile, Accumulator* partials, Accumulator* slots, const LocalPartial& local_partial,
                         const OnReduced& on_reduced, const Reload& reload) {
  if (persistent.group == GroupKind::kGrid) {
    exchange_in_memory(persistent, partition, cta, channel_tile, slots, local_partial, on_reduced, reload);
  } else {
    const int turn = channel_tile / persistent.groups % kPartialBuffers;
    exchange_on_chip(persistent, channels_of(partition, channel_tile), partials + turn * kMaxTileChannels<kLayout>,
                     local_partial, on_reduced);
  }
}

// Before a block ends.
BNK_DEVICE void leave(const PersistentParams& persistent) {
  if (persistent.group == GroupKind::kCluster)
    cluster_barrier();  // what this block told is read before its memory goes
}

}  // namespace bnk
