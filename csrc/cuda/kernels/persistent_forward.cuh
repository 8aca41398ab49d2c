// Training forward in one launch: reads x once, writes y once (Ioffe & Szegedy 2015, Algorithm 1).
//
// A CTA group takes one channel tile per round, a CTA one work tile of it (plan.h). In each round, a CTA
//
//   1. loads its work tile, caches it in shared memory, and takes the mean of the cached part: the pivot p of each
//      channel
//   2. sums d = x - p and d^2 from the cache:  mean = p + sum(d)/n,  m2 = sum(d^2) - sum(d)^2/n.  The pivot is a mean
//      of at least a sixteenth of the work tile, so the subtracted term is small or, if the rest lies elsewhere, part
//      of the variance
//   3. all-reduces the Welford data in its group (persistent.cuh)
//   4. writes  y = epilogue((x - mean) * invstd * weight + bias)  from the cache
//
// Vectors that do not fit in the cache are read in step 2 and, in reverse order, again in step 4. A thread visits the
// same vectors in all steps (tile_iterator.cuh). It sums at most a few hundred values in opmath_t, the CTA sums in
// double.
#pragma once

#include "../device/block_reduce.cuh"
#include "../device/epilogue.cuh"
#include "../device/persistent.cuh"
#include "../device/statistics_results.cuh"

namespace bnk {

// Full vectors that a thread loads per tile of the cached part: as many as the backward loads of its two tensors. While
// one CTA of a multiprocessor writes, only the loads of the other keep memory busy.
inline constexpr int kForwardLoadVectors = 2 * kVectorsPerThread;

struct PersistentForwardParams {
  TilePartition partition;
  PersistentParams persistent;
  const void* x;
  void* y;
  ConstPerChannel weight;
  ConstPerChannel bias;
  int64_t* num_batches_tracked;  // may be null
  StatisticsResults results;
  Epilogue epilogue;
};

// Sums of d = x - pivot and of d^2, per element of a vector.
template <typename T, int kColumns>
struct Deviations : ElementSums<T> {
  using opmath_t = opmath_type<T>;
  static constexpr int kElements = kVectorElements<T>;

  BNK_DEVICE void add(int element, opmath_t deviation) {
    this->first[element] += deviation;
    this->second[element] = fused_multiply_add(deviation, deviation, this->second[element]);
  }

  // kFull: all elements of all vectors are valid.
  template <bool kFull, typename Access, int kVectors>
  BNK_DEVICE void add_tile(const Access (&accesses)[kVectors], const Vector<T> (&bits)[kVectors],
                           const opmath_t (&pivot)[kColumns]) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      opmath_t values[kElements];
      to_opmath_vector(bits[i], values);
#pragma unroll
      for (int element = 0; element < kElements; ++element) {
        if (!kFull && (element < accesses[i].begin || element >= accesses[i].end)) continue;
        add(element, values[element] - pivot[element % kColumns]);
      }
    }
  }

  // Adds one vector to the rescaled sums only.
  BNK_DEVICE void add_rescaled(const VectorAccess& access, const Vector<T>& bits, const opmath_t (&pivot)[kColumns]) {
    constexpr opmath_t kScale = kOverflowScale<opmath_t>;
    opmath_t values[kElements];
    to_opmath_vector(bits, values);
#pragma unroll
    for (int element = 0; element < kElements; ++element) {
      if (element < access.begin || element >= access.end || !this->is_rescaled(element)) continue;
      add(element, values[element] * kScale - pivot[element % kColumns] * kScale);
    }
  }
};

// Re-accumulates a thread's vectors first .. first + count - 1 into the rescaled sums.
template <bool kIsCached, typename T, Layout kLayout, int kColumns>
BNK_DEVICE void sum_rescaled(const View<const T, kLayout>& x, PersistentTileIterator<T, kLayout>& iterator,
                             const SmemCache<T>& cache, int first, int count, const opmath_type<T> (&pivot)[kColumns],
                             Deviations<T, kColumns>& sums) {
  iterator.seek(first);
  for (int number = first; number < first + count && iterator.more(); ++number) {
    const VectorAccess access = iterator.next();
    sums.add_rescaled(access, kIsCached ? cache[number] : load_access<CacheOp::kDefault>(x, access), pivot);
  }
}

// Sums a thread's vectors first .. first + count - 1, which are all cached or all not cached.
template <bool kIsCached, typename T, Layout kLayout, int kColumns>
BNK_DEVICE void sum_deviations(const View<const T, kLayout>& x, PersistentTileIterator<T, kLayout>& iterator,
                               bool whole, const SmemCache<T>& cache, int first, int count,
                               const opmath_type<T> (&pivot)[kColumns], Deviations<T, kColumns>& sums) {
  constexpr int kVectors = kVectorsPerThread;
  sums.clear();
  visit_vectors<kVectors>(iterator, first, count, whole, [&](const auto& accesses, int number) {
    Vector<T> bits[kVectors];
    if constexpr (kIsCached) {
      load_cached(cache, accesses, number, bits);
    } else {
      load_vectors(x, accesses, bits, HintedLoads{evict_last()});
    }
    if (all_full(accesses, kVectorElements<T>)) {
      sums.template add_tile<true>(accesses, bits, pivot);
    } else {
      sums.template add_tile<false>(accesses, bits, pivot);
    }
  });
  if (sums.needs_rescale()) sum_rescaled<kIsCached>(x, iterator, cache, first, count, pivot, sums);
}

// kHasEpilogue: params.epilogue.enabled().
template <typename T, Layout kLayout, bool kHasEpilogue>
BNK_KERNEL(persistent_threads(kLayout), kMinBlocksPerMultiprocessor)
persistent_forward_kernel(PersistentForwardParams params) {
  using Iterator = PersistentTileIterator<T, kLayout>;
  using opmath_t = opmath_type<T>;
  constexpr int kVectors = kVectorsPerThread;
  constexpr int kColumns = Iterator::kColumns;
  constexpr int kElements = Iterator::kElements;
  constexpr int kTileChannels = kMaxTileChannels<kLayout>;
  BNK_SHARED(double, slots, (kPersistentSlots<T, kLayout>));
  BNK_SHARED(Sums, totals, kTileChannels);
  BNK_SHARED(WelfordData, partials, kPartialBuffers * kTileChannels);
  BNK_SHARED(opmath_t, pivots, kTileChannels);
  BNK_SHARED(opmath_t, means, kTileChannels);
  BNK_SHARED(opmath_t, invstds, kTileChannels);
  BNK_SHARED(opmath_t, weights, kTileChannels);
  BNK_SHARED(opmath_t, biases, kTileChannels);
  BNK_DYNAMIC_SHARED(Vector<T>, dynamic);
  static_assert(sizeof slots + sizeof totals + sizeof partials + 5 * sizeof pivots <= persistent_overhead(kLayout));
  const SmemCache<T> cache{dynamic};

  const TilePartition& partition = params.partition;
  const PersistentParams& persistent = params.persistent;
  const CtaCoord cta = cta_coord(persistent);
  const T* lead = static_cast<const T*>(params.x);
  const T* more = kHasEpilogue ? static_cast<const T*>(params.epilogue.residual) : nullptr;
  T* out = static_cast<T*>(params.y);
  const View<const T, kLayout> x{lead, elements_of(partition), Iterator::is_wide(partition, lead, lead)};
  // y and the residual share one `wide` flag: the values that the steps hold in registers leave none for a second.
  const bool added_wide = more == nullptr || Iterator::is_wide(partition, more, lead);
  const View<T, kLayout> y{out, elements_of(partition), added_wide && Iterator::is_wide(partition, out, lead)};
  const bool whole = Iterator::is_whole(partition) && x.wide && y.wide;

  for (int channel_tile = cta.group; channel_tile < partition.channel_tiles.value; channel_tile += persistent.groups) {
    const auto channel_of = [&](int local) { return first_channel(partition, channel_tile) + local; };
    Iterator iterator(partition, {channel_tile, cta.rank}, lead);

    // 1. Load the work tile and compute the pivots.
    Deviations<T, kColumns> sums;
    sums.clear();
    visit_vectors<kVectors, kForwardLoadVectors>(iterator, 0, persistent.cached_vectors, whole,
                                                 [&](const auto& accesses, int first) {
                                                   constexpr int kCount = kAccesses<decltype(accesses)>;
                                                   Vector<T> bits[kCount];
                                                   load_vectors<CacheOp::kStreaming>(x, accesses, bits);
                                                   cache_vectors(cache, accesses, first, bits);
#pragma unroll
                                                   for (int i = 0; i < kCount; ++i) {
                                                     opmath_t values[kElements];
                                                     unpack_access(bits[i], accesses[i], values);
#pragma unroll
                                                     for (int element = 0; element < kElements; ++element)
                                                       sums.first[element] += values[element];
                                                   }
                                                 });
    const opmath_t zero[kColumns] = {};
    if (sums.needs_rescale()) sum_rescaled<true>(x, iterator, cache, 0, persistent.cached_vectors, zero, sums);
    const auto sum_of = [&](int element) { return sums(element).first; };
    reduce_channel_tile<T>(partition, iterator, channel_tile, sum_of, slots, [&](int local, double all) {
      pivots[local] =
          static_cast<opmath_t>(all / static_cast<double>(iterator.elements_of_first(persistent.cached_vectors)));
    });

    // 2. Sum the deviations from the pivots.
    const auto sum = [&](int first, int count) {
      opmath_t pivot[kColumns];
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        pivot[column] = iterator.has_channel(column) ? pivots[iterator.local(column)] : opmath_t(0);
      }
      if (first == 0) {
        sum_deviations<true>(x, iterator, whole, cache, first, count, pivot, sums);
      } else {
        sum_deviations<false>(x, iterator, whole, cache, first, count, pivot, sums);
      }
    };
    sum_work_tile(partition, iterator, channel_tile, persistent.cached_vectors, slots_of<Sums>(slots), totals, sum,
                  sums);

    // 3. All-reduce the statistics.
    const auto set = [&](int local, double mean, double invstd) {
      const int64_t channel = channel_of(local);
      means[local] = static_cast<opmath_t>(mean);
      invstds[local] = static_cast<opmath_t>(invstd);
      weights[local] = static_cast<opmath_t>(read_or(params.weight, channel, 1));
      biases[local] = static_cast<opmath_t>(read_or(params.bias, channel, 0));
      expect_uniform(channel, means[local]);
      expect_uniform(channel, invstds[local]);
    };
    const auto on_reduced = [&](int local, const WelfordData& all) {
      expect_uniform(channel_of(local), all.mean);
      expect_uniform(channel_of(local), all.m2);
      set(local, all.mean, invstd_of(params.results, all));
      if (persistent.two_shot || cta.rank == 0) {
        const int64_t batches = params.results.cumulative ? load(params.num_batches_tracked) + 1 : 0;
        write_statistics(params.results, channel_of(local), all, running_factor(params.results, batches));
      }
    };
    const auto local_partial = [&](int local) {
      const Sums all = totals[local];
      const double count = static_cast<double>(iterator.elements());
      const double shift = all.first / count;
      const double m2 = fused_multiply_add(-shift, all.first, all.second);
      return WelfordData{count, static_cast<double>(pivots[local]) + shift, m2 < 0 ? 0 : m2};
    };
    const auto reload = [&](int local) {
      const int64_t channel = channel_of(local);
      set(local, read(params.results.mean, channel), read(params.results.invstd, channel));
    };
    exchange<kLayout>(persistent, partition, cta, channel_tile, partials, slots_of<WelfordData>(slots), local_partial,
                      on_reduced, reload);

    // 4. Write y.
    opmath_t mean[kColumns], invstd[kColumns], weight[kColumns], bias[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      // A column without a channel takes the values of another: its results are never written, and a branch would cost
      // a register.
      const int local = iterator.has_channel(column) ? iterator.local(column) : 0;
      mean[column] = means[local];
      invstd[column] = invstds[local];
      weight[column] = weights[local];
      bias[column] = biases[local];
    }
    const View<const T, kLayout> residual{more, y.elements, y.wide};
    revisit_vectors<kVectors>(
        iterator, persistent.cached_vectors, whole, [&](const auto& accesses, int first, auto is_cached) {
          Vector<T> bits[kVectors];
          [[maybe_unused]] ResidualTile<T, kVectors, is_cached.value> added;
          if constexpr (kHasEpilogue) added.load(residual, accesses);
          if constexpr (is_cached.value) {
            load_cached(cache, accesses, first, bits);
          } else {
            load_vectors<CacheOp::kStreaming>(x, accesses, bits);
          }
#pragma unroll
          for (int i = 0; i < kVectors; ++i) {
            opmath_t values[kElements];
            unpack_access(bits[i], accesses[i], values);
#pragma unroll
            for (int element = 0; element < kElements; ++element) {
              const int column = element % kColumns;
              values[element] = normalized(values[element], mean[column], invstd[column], weight[column], bias[column]);
            }
            if constexpr (kHasEpilogue) {
              added.add(residual, accesses, i, values);
              relu(params.epilogue.relu, values);
            }
            store_access(y, accesses[i], values);
          }
        });

    // Overlaps with the stores of y. The barriers of the next channel tile precede its writes to means, invstds,
    // weights and biases.
    if constexpr (kHasEpilogue) {
      if (params.epilogue.low.data == nullptr || cta.rank != 0) continue;
      for (int local = static_cast<int>(thread_rank()); local < channels_of(partition, channel_tile);
           local += static_cast<int>(block_threads())) {
        write_relu_bounds<T>(params.epilogue, channel_of(local), means[local], invstds[local], weights[local],
                             biases[local]);
      }
    }
  }

  leave(persistent);
  if (params.num_batches_tracked == nullptr) return;
  // Every thread reads the count for the cumulative average before a barrier of its CTA. So when the last CTA arrives
  // here, all have read it, and this batch can be counted.
  const bool counts = params.results.cumulative ? last_of_launch(persistent) : block_rank() == 0 && thread_rank() == 0;
  if (counts) store(params.num_batches_tracked, load(params.num_batches_tracked) + 1);
}

}  // namespace bnk
