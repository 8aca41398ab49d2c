// Backward of the training forward in one launch: reads grad_y and x once, writes grad_x once.
//
// g = grad_y after the backward of the epilogue (epilogue.cuh) and xhat = (x - mean) * invstd. A CTA group takes one
// channel tile per round, a CTA one work tile of it (plan.h). In each round, a CTA
//
//   1. loads grad_y and x, caches them in shared memory, and sums g and g*(x - mean)
//   2. all-reduces the sums in its group (persistent.cuh):
//      grad_bias = sum(g),  grad_weight = sum(g*(x - mean)) * invstd
//   3. writes  grad_x = (g - mean(g) - (x - mean) * slope) * scale  from the cache,
//      where slope = mean(g*xhat) * invstd  and  scale = weight * invstd
//
// Vectors that do not fit in the cache are read in step 1 and, in reverse order, again in step 3. A thread visits the
// same vectors in steps 1 and 3 (tile_iterator.cuh).
#pragma once

#include "../device/epilogue.cuh"
#include "../device/persistent.cuh"

namespace bnk {

struct PersistentBackwardParams {
  TilePartition partition;
  PersistentParams persistent;
  const void* grad_y;
  const void* x;
  void* grad_x;
  ConstPerChannel weight;
  ConstPerChannel mean;
  ConstPerChannel invstd;
  double elements_per_channel;
  PerChannel grad_weight;    // may be null
  PerChannel grad_bias;      // may be null
  PerChannel mean_g;         // double; two-shot only
  PerChannel mean_g_xhat;    // double; two-shot only
  ConstPerChannel relu_low;  // null: no ReLU
  ConstPerChannel relu_high;
};

// Sums of g and of g*(x - mean), per element of a vector.
template <typename T, int kColumns>
struct Products : ElementSums<T> {
  using opmath_t = opmath_type<T>;
  static constexpr int kElements = kVectorElements<T>;

  BNK_DEVICE void add(int element, opmath_t gradient, opmath_t deviation) {
    this->first[element] += gradient;
    this->second[element] = fused_multiply_add(gradient, deviation, this->second[element]);
  }

  // kFull: all elements of all vectors are valid. A masked element adds nothing, whatever the channel's statistics.
  template <bool kFull, typename Access, int kVectors, typename Backward>
  BNK_DEVICE void add_tile(const Access (&accesses)[kVectors], const Vector<T> (&x_bits)[kVectors],
                           const Vector<T> (&g_bits)[kVectors], const opmath_t (&mean)[kColumns],
                           const Backward& epilogue) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      opmath_t xs[kElements], gs[kElements];
      to_opmath_vector(x_bits[i], xs);
      to_opmath_vector(g_bits[i], gs);
#pragma unroll
      for (int element = 0; element < kElements; ++element) {
        if (!kFull && (element < accesses[i].begin || element >= accesses[i].end)) continue;
        add(element, epilogue(element, xs[element], gs[element]), xs[element] - mean[element % kColumns]);
      }
    }
  }

  // Adds one vector to the rescaled sums only.
  template <typename Backward>
  BNK_DEVICE void add_rescaled(const VectorAccess& access, const Vector<T>& x_bits, const Vector<T>& g_bits,
                               const opmath_t (&mean)[kColumns], const Backward& epilogue) {
    constexpr opmath_t kScale = kOverflowScale<opmath_t>;
    opmath_t xs[kElements], gs[kElements];
    to_opmath_vector(x_bits, xs);
    to_opmath_vector(g_bits, gs);
#pragma unroll
    for (int element = 0; element < kElements; ++element) {
      if (element < access.begin || element >= access.end || !this->is_rescaled(element)) continue;
      add(element, epilogue(element, xs[element], gs[element]) * kScale,
          xs[element] * kScale - mean[element % kColumns] * kScale);
    }
  }
};

// Re-accumulates a thread's vectors first .. first + count - 1 into the rescaled sums.
template <typename T, Layout kLayout, int kColumns, typename Backward>
BNK_DEVICE void sum_rescaled(const View<const T, kLayout>& x, const View<const T, kLayout>& g,
                             PersistentTileIterator<T, kLayout>& iterator, int first, int count,
                             const opmath_type<T> (&mean)[kColumns], const Backward& epilogue,
                             Products<T, kColumns>& sums) {
  iterator.seek(first);
  for (int number = first; number < first + count && iterator.more(); ++number) {
    const VectorAccess access = iterator.next();
    sums.add_rescaled(access, load_access<CacheOp::kDefault>(x, access), load_access<CacheOp::kDefault>(g, access),
                      mean, epilogue);
  }
}

// kHasRelu: the forward ended with a ReLU.
template <typename T, Layout kLayout, bool kHasRelu>
BNK_KERNEL(persistent_threads(kLayout), kMinBlocksPerMultiprocessor)
persistent_backward_kernel(PersistentBackwardParams params) {
  using Iterator = PersistentTileIterator<T, kLayout>;
  using opmath_t = opmath_type<T>;
  constexpr int kVectors = kVectorsPerThread;
  constexpr int kColumns = Iterator::kColumns;
  // The ReLU bounds, one per column, leave registers for fewer vectors.
  constexpr int kResultVectors = kHasRelu && kColumns > 1 ? 1 : kVectors;
  constexpr int kElements = Iterator::kElements;
  constexpr int kTileChannels = kMaxTileChannels<kLayout>;
  BNK_SHARED(double, slots, (kPersistentSlots<T, kLayout>));
  BNK_SHARED(Sums, totals, kTileChannels);
  BNK_SHARED(Sums, partials, kPartialBuffers * kTileChannels);
  BNK_SHARED(opmath_t, scales, kTileChannels);
  BNK_SHARED(opmath_t, means_g, kTileChannels);
  BNK_SHARED(opmath_t, slopes, kTileChannels);
  BNK_DYNAMIC_SHARED(Vector<T>, dynamic);
  static_assert(sizeof slots + sizeof totals + sizeof partials + 3 * sizeof scales <= persistent_overhead(kLayout));

  const TilePartition& partition = params.partition;
  const PersistentParams& persistent = params.persistent;
  const SmemCache<T> cache_x{dynamic};
  const SmemCache<T> cache_g{dynamic + persistent.cached_vectors * static_cast<int>(block_threads())};
  const CtaCoord cta = cta_coord(persistent);
  const T* lead = static_cast<const T*>(params.x);
  const T* grad = static_cast<const T*>(params.grad_y);
  T* out = static_cast<T*>(params.grad_x);
  const View<const T, kLayout> x{lead, elements_of(partition), Iterator::is_wide(partition, lead, lead)};
  const View<const T, kLayout> g{grad, elements_of(partition), Iterator::is_wide(partition, grad, lead)};
  const View<T, kLayout> grad_x{out, elements_of(partition), Iterator::is_wide(partition, out, lead)};
  const bool whole = Iterator::is_whole(partition) && x.wide && g.wide && grad_x.wide;

  for (int channel_tile = cta.group; channel_tile < partition.channel_tiles.value; channel_tile += persistent.groups) {
    const auto channel_of = [&](int local) { return first_channel(partition, channel_tile) + local; };
    Iterator iterator(partition, {channel_tile, cta.rank}, lead);
    opmath_t mean[kColumns];
    EpilogueBackward<kHasRelu, opmath_t, kColumns> epilogue;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!iterator.has_channel(column)) continue;
      mean[column] = static_cast<opmath_t>(read(params.mean, iterator.channel(column)));
      epilogue.read_channel(params.relu_low, params.relu_high, column, iterator.channel(column));
    }

    // 1. Load the work tile and sum it.
    Products<T, kColumns> sums;
    const auto sum = [&](int first, int count) {
      const bool keeps = first == 0;
      const HintedLoads loads{keeps ? evict_first() : evict_last()};
      sums.clear();
      visit_vectors<kVectors>(iterator, first, count, whole, [&](const auto& accesses, int number) {
        Vector<T> x_bits[kVectors], g_bits[kVectors];
        load_vectors(x, accesses, x_bits, loads);
        load_vectors(g, accesses, g_bits, loads);
        if (keeps) {
          cache_vectors(cache_x, accesses, number, x_bits);
          cache_vectors(cache_g, accesses, number, g_bits);
        }
        if (all_full(accesses, kElements)) {
          sums.template add_tile<true>(accesses, x_bits, g_bits, mean, epilogue);
        } else {
          sums.template add_tile<false>(accesses, x_bits, g_bits, mean, epilogue);
        }
      });
      if (sums.needs_rescale()) sum_rescaled(x, g, iterator, first, count, mean, epilogue, sums);
    };
    sum_work_tile(partition, iterator, channel_tile, persistent.cached_vectors, slots_of<Sums>(slots), totals, sum,
                  sums);

    // 2. All-reduce the sums of the channel.
    const auto set = [&](int local, double mean_g, double mean_g_xhat) {
      const int64_t channel = channel_of(local);
      const double invstd = read(params.invstd, channel);
      scales[local] = static_cast<opmath_t>(read_or(params.weight, channel, 1) * invstd);
      means_g[local] = static_cast<opmath_t>(mean_g);
      slopes[local] = static_cast<opmath_t>(mean_g_xhat * invstd);
      expect_uniform(channel, means_g[local]);
      expect_uniform(channel, slopes[local]);
    };
    const auto on_reduced = [&](int local, const Sums& all) {
      const int64_t channel = channel_of(local);
      expect_uniform(channel, all.first);
      expect_uniform(channel, all.second);
      const double sum_g_xhat = all.second * read(params.invstd, channel);
      const double mean_g = all.first / params.elements_per_channel;
      const double mean_g_xhat = sum_g_xhat / params.elements_per_channel;
      set(local, mean_g, mean_g_xhat);
      if (!persistent.two_shot && cta.rank != 0) return;
      write(params.grad_bias, channel, all.first);
      write(params.grad_weight, channel, sum_g_xhat);
      if (!persistent.two_shot) return;
      write(params.mean_g, channel, mean_g);
      write(params.mean_g_xhat, channel, mean_g_xhat);
    };
    const auto local_partial = [&](int local) { return totals[local]; };
    const auto reload = [&](int local) {
      const int64_t channel = channel_of(local);
      set(local, read(params.mean_g, channel), read(params.mean_g_xhat, channel));
    };
    exchange<kLayout>(persistent, partition, cta, channel_tile, partials, slots_of<Sums>(slots), local_partial,
                      on_reduced, reload);

    // 3. Write grad_x.
    opmath_t scale[kColumns], mean_g[kColumns], slope[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!iterator.has_channel(column)) continue;
      const int local = iterator.local(column);
      scale[column] = scales[local];
      mean_g[column] = means_g[local];
      slope[column] = slopes[local];
    }
    revisit_vectors<kResultVectors>(
        iterator, persistent.cached_vectors, whole, [&](const auto& accesses, int first, auto is_cached) {
          Vector<T> x_bits[kResultVectors], g_bits[kResultVectors];
          if constexpr (is_cached.value) {
            load_cached(cache_x, accesses, first, x_bits);
            load_cached(cache_g, accesses, first, g_bits);
          } else {
            load_vectors<CacheOp::kStreaming>(x, accesses, x_bits);
            load_vectors<CacheOp::kStreaming>(g, accesses, g_bits);
          }
#pragma unroll
          for (int i = 0; i < kResultVectors; ++i) {
            opmath_t xs[kElements], gs[kElements];
            to_opmath_vector(x_bits[i], xs);
            to_opmath_vector(g_bits[i], gs);
#pragma unroll
            for (int element = 0; element < kElements; ++element) {
              const int column = element % kColumns;
              const opmath_t deviation = xs[element] - mean[column];
              const opmath_t centered = epilogue(element, xs[element], gs[element]) - mean_g[column];
              gs[element] = fused_multiply_add(-deviation, slope[column], centered) * scale[column];
            }
            store_access(grad_x, accesses[i], gs);
          }
        });
  }
  leave(persistent);
}

}  // namespace bnk
