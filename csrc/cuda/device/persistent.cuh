// Shared parts of the persistent kernels: CTA groups, the shared memory cache of vectors, and the exchange within a
// group (PersistentPlan, in plan.h).
#pragma once

#include <type_traits>

#include "channel_tile_reduce.cuh"
#include "partials.cuh"
#include "visit_vectors.cuh"
#include "welford.cuh"

namespace bnk {

// Vectors after the cached ones that a thread sums in opmath_t before the CTA accumulates the sums in double.
inline constexpr int kChainVectors = 64;

// A word of the barrier workspace (plan.h). The use of each word never changes, so every launch finds the words in the
// same state, whichever kernel used them before:
//
//   word 0        last_to_arrive of a launch: 0 between launches
//   word 1 + g    group_barrier of group g: 0 except for its top bit between launches
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
  double* partial;             // grid groups only, see partials.cuh
  BarrierWord* barrier_words;  // null if the launch uses none
};

// Shared memory of a persistent kernel's reductions, in doubles: of a channel tile's sums and of a group's Welford
// data.
template <typename T, Layout kLayout>
inline constexpr int kSumSlots = kFields<Sums> * kChannelTileSlots<T, kLayout>;
template <Layout kLayout>
inline constexpr int kCombineThreadsC = kLayout == Layout::kChannelsFirst ? 1 : kWarpThreads;  // upper bound
template <Layout kLayout>
inline constexpr int kCombineSlots = kFields<WelfordData> * kReduceSlots<1, kCombineThreadsC<kLayout>>;
template <typename T, Layout kLayout>
inline constexpr int kPersistentSlots =
    kSumSlots<T, kLayout> > kCombineSlots<kLayout> ? kSumSlots<T, kLayout> : kCombineSlots<kLayout>;

template <typename Accumulator>
BNK_DEVICE Accumulator* slots_of(double* slots) {
  return reinterpret_cast<Accumulator*>(slots);
}

// Channel tiles whose partials a CTA of a cluster holds: one that other CTAs may still be reading, and the next.
inline constexpr int kPartialBuffers = 2;

// Plans of the persistent kernel count the elements of a row in 32 bits (kMaxPersistentRow, in plan/persistent.cpp).
template <typename T, Layout kLayout>
using PersistentTileIterator = TileIterator<T, kLayout, int>;

// This CTA's position in the grid.
struct CtaCoord {
  int group;
  int rank;
};

BNK_DEVICE CtaCoord cta_coord(const PersistentParams& persistent) {
  const int block = static_cast<int>(block_rank());
  return {block / persistent.group_size, block % persistent.group_size};
}

// True in one thread of the launch, in the last CTA to call it. Everything that other CTAs read before a block barrier
// that precedes their call has been read by then.
BNK_DEVICE bool last_of_launch(const PersistentParams& persistent) {
  return thread_rank() == 0 && last_to_arrive(&persistent.barrier_words[0].value, grid_blocks());
}

// Overflow rescale. Sums of finite floats can overflow, and sums of products soon do. Re-accumulate those elements
// scaled by kOverflowScale and undo the scale in double. Elements whose sums are finite are not rescaled: they may
// belong to other channels, whose values would underflow at this scale.
template <typename opmath_t>
inline constexpr opmath_t kOverflowScale = sizeof(opmath_t) == 4 ? opmath_t(0x1p-80) : opmath_t(1);

// Two sums per element of a vector.
template <typename T>
struct ElementSums {
  using opmath_t = opmath_type<T>;
  static constexpr int kElements = kVectorElements<T>;
  opmath_t first[kElements];
  opmath_t second[kElements];
  unsigned rescaled;  // bit i: the sums of element i are scaled by kOverflowScale and by its square

  BNK_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kElements; ++i) first[i] = second[i] = 0;
    rescaled = 0;
  }

  // Clears the sums that are not finite, for re-accumulation. Returns false if all are finite.
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

// Shared memory cache of each thread's first vectors of one tensor. A thread reads only what it wrote: no barrier
// needed.
template <typename T>
struct SmemCache {
  Vector<T>* slots;

  BNK_DEVICE Vector<T>& operator[](int vector) const {
    return slots[vector * static_cast<int>(block_threads()) + static_cast<int>(thread_rank())];
  }
};

// Loads a tile of cached vectors, starting at vector `first`.
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

// Visits a thread's vectors tile by tile (visit_vectors): first the vectors that are not cached in shared memory, in
// reverse order because the most recently read ones are most likely still in L2, then the cached ones. Calls
// visit(vectors, number, is_cached), where is_cached.value is a compile-time constant.
template <int kVectors, typename Iterator, typename Visit>
BNK_DEVICE void revisit_vectors(Iterator& iterator, int cached_vectors, bool whole, const Visit& visit) {
  const auto again = [&](const auto& accesses, int first) { visit(accesses, first, std::false_type{}); };
#pragma unroll 1
  for (int tile = (iterator.vectors() - cached_vectors + kVectors - 1) / kVectors; tile-- > 0;) {
    const int first = cached_vectors + tile * kVectors;
    iterator.seek(first);
    if (whole && has_vectors<kVectors>(iterator, first)) {
      auto full_iterator = iterator.whole();
      visit_full<kVectors, typename Iterator::Element>(full_iterator, first, again);
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

// Channels of a channel tile; the last tile may have fewer.
BNK_DEVICE int channels_of(const TilePartition& partition, int channel_tile) {
  const int64_t rest = partition.channels - first_channel(partition, channel_tile);
  return rest < partition.tile_channels ? static_cast<int>(rest) : partition.tile_channels;
}

// Sums a work tile in steps: first the cached vectors of each thread, then kChainVectors vectors per thread and step.
// sum(first, count) sums the thread's vectors from `first` on, and at(element) returns the sums. The CTA's sums over
// all steps are accumulated in totals[local] and visible to all threads on return.
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

// All-reduces the per-channel partials of a channel tile across the CTA group. local_partial(local) is this CTA's
// partial of a channel; on_reduced(local, all) is called with the combined value, from one thread per channel, in one
// of two ways:
//
//   one-shot   every CTA combines all channels
//   two-shot   each channel is combined by one CTA, whose on_reduced stores the results to global memory; then every
//              CTA calls reload(local), from one thread per channel, to read them
//
// On return, all threads of the CTA see what on_reduced and reload wrote to shared memory. Clusters and single CTAs use
// exchange_on_chip, grid groups use exchange_in_memory.

// The partial of the CTA of the given rank. `partials` points to this CTA's own; it has the same address in every CTA.
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

// Single CTAs and clusters. The CTA publishes its partials in partials[local]. Its peers may read them until they reach
// the next cluster barrier, so the next channel tile needs another buffer.
template <typename Accumulator, typename LocalPartial, typename OnReduced>
BNK_DEVICE void exchange_on_chip(const PersistentParams& persistent, int channels, Accumulator* partials,
                                 const LocalPartial& local_partial, const OnReduced& on_reduced) {
  for (int local = thread_rank(); local < channels; local += block_threads()) partials[local] = local_partial(local);
  if (persistent.group == GroupKind::kCluster) cluster_barrier();  // all partials are written before peers read them
  for (int local = thread_rank(); local < channels; local += block_threads()) {
    Accumulator all{};
    for (int rank = 0; rank < persistent.group_size; ++rank) combine(all, peer_partial(rank, partials + local));
    on_reduced(local, all);
  }
  block_barrier();  // all threads see what on_reduced wrote to shared memory
}

// Grid groups, through the partials in global memory (partials.cuh).
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
  group_barrier(counter, persistent.group_size, cta.rank);  // all partials are stored before they are read
  const int worker = persistent.two_shot ? cta.rank : 0;
  const int workers = persistent.two_shot ? persistent.group_size : 1;
  combine_channels(partials, persistent.partial, first, channels, worker, workers, slots, on_reduced);
  if (!persistent.two_shot) return;
  group_barrier(counter, persistent.group_size, cta.rank);  // all results are stored before they are reloaded
  for (int local = thread_rank(); local < channels; local += block_threads()) reload(local);
  block_barrier();  // all threads see what reload wrote to shared memory
}

// partials: kPartialBuffers * kMaxTileChannels accumulators in shared memory, a buffer per channel tile in rotation.
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

// Called by all threads before a CTA exits.
BNK_DEVICE void leave(const PersistentParams& persistent) {
  if (persistent.group == GroupKind::kCluster)
    cluster_barrier();  // peers have read this CTA's partials before its shared memory is released
}

}  // namespace bnk
