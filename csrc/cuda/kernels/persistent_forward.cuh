// Forward training in one launch: x is read once, y written once (Ioffe & Szegedy 2015, Algorithm 1).
//
// A group of blocks owns a channel tile of channels, a block its share of it (plan.h). For each channel tile, a block
//
//   1. loads its share, keeps it on chip, and takes the mean of what it kept: the pivot p of each channel
//   2. sums d = x - p and d^2 from there:  mean = p + sum(d)/n,  m2 = sum(d^2) - sum(d)^2/n.  The pivot is a mean of at least
//      a sixteenth of the share, so that what is subtracted is small or, where the rest lies elsewhere, part of the variance
//   3. tells its group its Welford data and joins those of all members (persistent.cuh)
//   4. writes  y = (x - mean) * invstd * weight + bias, through the epilogue, from what it kept
//
// What it could not keep is read in step 2 and, last first, in step 4. A thread sums a few hundred values at most in the
// elements' compute type, the block in double.
#pragma once

#include "../device/epilogue.cuh"
#include "../device/persistent.cuh"
#include "../device/statistics_results.cuh"
#include "../device/sums.cuh"

namespace bnk {

// Whole vectors that a thread loads at a time of what it keeps: as many as the backward does, of two tensors. While one block
// of a multiprocessor writes, the loads of the other alone keep memory busy.
inline constexpr int kForwardLoadVectors = 2 * kVectorsPerThread;

struct PersistentForwardParams {
  TilePartition partition;
  PersistentParams persistent;
  const void* x;
  void* y;
  ConstPerChannel weight;
  ConstPerChannel bias;
  int64_t* num_batches_tracked;  // or null
  StatisticsResults results;
  Epilogue epilogue;
};

// Sums of d = x - pivot and of d^2, by element of a vector.
template <typename T, int kColumns>
struct Deviations : ElementSums<T> {
  using opmath_t = opmath_type<T>;
  static constexpr int kElements = kVectorElements<T>;

  BNK_DEVICE void add(int element, opmath_t deviation) {
    this->first[element] += deviation;
    this->second[element] = fused_multiply_add(deviation, deviation, this->second[element]);
  }

  // kFull: all elements of all vectors are there.
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

  // One vector, to those that are rescaled.
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

// Sums a thread's vectors first .. first + count - 1 again, to the elements that are rescaled.
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

// Of a thread's vectors first .. first + count - 1, which are kept or not.
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

// kHasEpilogue: there is an epilogue.
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
  // The result and what is added to it are wide together: what the steps keep in registers leaves no room for more.
  const bool added_wide = more == nullptr || Iterator::is_wide(partition, more, lead);
  const View<T, kLayout> y{out, elements_of(partition), added_wide && Iterator::is_wide(partition, out, lead)};
  const bool whole = Iterator::is_whole(partition) && x.wide && y.wide;

  for (int channel_tile = cta.group; channel_tile < partition.channel_tiles.value; channel_tile += persistent.groups) {
    const auto channel_of = [&](int local) { return first_channel(partition, channel_tile) + local; };
    Iterator iterator(partition, {channel_tile, cta.rank}, lead);

    // 1. The share, and the pivots.
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

    // 2. The deviations from them.
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

    // 3. The statistics.
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

    // 4. The result.
    opmath_t mean[kColumns], invstd[kColumns], weight[kColumns], bias[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      // A column that is not there gets another's: nothing is written of it, and a branch would cost a register.
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

    // While the results are under way. The next channel tile's values come behind barriers.
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
  // Every thread has read a cumulative average's count, before a barrier of its block, when the last block here counts this
  // batch.
  const bool counts = params.results.cumulative ? last_of_launch(persistent) : block_rank() == 0 && thread_rank() == 0;
  if (counts) store(params.num_batches_tracked, load(params.num_batches_tracked) + 1);
}

}  // namespace bnk
