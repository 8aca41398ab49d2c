// Forward training in one launch: x is read once, y written once (Ioffe & Szegedy 2015, Algorithm 1).
//
// A group of blocks owns a slab of channels, a block its share of it (plan.h). For each slab, a block
//
//   1. loads its share, keeps it on chip, and takes the mean of what it kept: the pivot p of each channel
//   2. sums d = x - p and d^2 from there:  mean = p + sum(d)/n,  m2 = sum(d^2) - sum(d)^2/n.  The pivot is a mean of at least
//      a sixteenth of the share, so that what is subtracted is small or, where the rest lies elsewhere, part of the variance
//   3. tells its group its moments and joins those of all members (resident.cuh)
//   4. writes  y = (x - mean) * invstd * weight + bias, through the epilogue, from what it kept
//
// What it could not keep is read in step 2 and, last first, in step 4. A thread sums a few hundred values at most in the
// elements' compute type, the block in double.
#pragma once

#include "epilogue.cuh"
#include "resident.cuh"
#include "statistics_results.cuh"
#include "sums.cuh"

namespace bnk {

// Whole windows that a thread loads at a time of what it keeps: as many as the backward does, of two tensors. While one block
// of a multiprocessor writes, the loads of the other alone keep memory busy.
inline constexpr int kForwardLoadTile = 2 * kResidentTile;

struct ResidentForwardParams {
  Walk walk;
  Residence residence;
  const void* x;
  void* y;
  ConstPerChannel weight;
  ConstPerChannel bias;
  int64_t* num_batches_tracked;  // or null
  StatisticsResults results;
  Epilogue epilogue;
};

// Sums of d = x - pivot and of d^2, by element of a window.
template <typename T, int kColumns>
struct Deviations : WindowSums<T> {
  using Real = Compute<T>;
  static constexpr int kElements = kVectorElements<T>;

  BNK_DEVICE void add(int element, Real deviation) {
    this->first[element] += deviation;
    this->second[element] = fused_multiply_add(deviation, deviation, this->second[element]);
  }

  // kFull: all elements of all windows are there.
  template <bool kFull, typename Window_, int kTile>
  BNK_DEVICE void add_tile(const Window_ (&windows)[kTile], const Vector<T> (&bits)[kTile],
                           const Real (&pivot)[kColumns]) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      Real values[kElements];
      widen_vector(bits[i], values);
#pragma unroll
      for (int element = 0; element < kElements; ++element) {
        if (!kFull && (element < windows[i].begin || element >= windows[i].end)) continue;
        add(element, values[element] - pivot[element % kColumns]);
      }
    }
  }

  // One window, to those that are rescued.
  BNK_DEVICE void add_rescued(const Window& window, const Vector<T>& bits, const Real (&pivot)[kColumns]) {
    constexpr Real kScale = kRescue<Real>;
    Real values[kElements];
    widen_vector(bits, values);
#pragma unroll
    for (int element = 0; element < kElements; ++element) {
      if (element < window.begin || element >= window.end || !this->is_rescued(element)) continue;
      add(element, values[element] * kScale - pivot[element % kColumns] * kScale);
    }
  }
};

// Sums a thread's windows first .. first + count - 1 again, to the elements that are rescued.
template <bool kIsKept, typename T, Layout kLayout, int kColumns>
BNK_DEVICE void sum_rescued(const View<const T, kLayout>& x, ResidentWalker<T, kLayout>& walker, const Kept<T>& kept,
                            int first, int count, const Compute<T> (&pivot)[kColumns], Deviations<T, kColumns>& sums) {
  walker.seek(first);
  for (int number = first; number < first + count && walker.more(); ++number) {
    const Window window = walker.next();
    sums.add_rescued(window, kIsKept ? kept[number] : load_window<Reuse::kAgain>(x, window), pivot);
  }
}

// Of a thread's windows first .. first + count - 1, which are kept or not.
template <bool kIsKept, typename T, Layout kLayout, int kColumns>
BNK_DEVICE void sum_deviations(const View<const T, kLayout>& x, ResidentWalker<T, kLayout>& walker, bool whole,
                               const Kept<T>& kept, int first, int count, const Compute<T> (&pivot)[kColumns],
                               Deviations<T, kColumns>& sums) {
  constexpr int kTile = kResidentTile;
  sums.clear();
  visit_tiles<kTile>(walker, first, count, whole, [&](const auto& windows, int number) {
    Vector<T> bits[kTile];
    if constexpr (kIsKept) {
      fetch_tile(kept, windows, number, bits);
    } else {
      load_tile(x, windows, bits, HintedLoads{evict_last()});
    }
    if (all_full(windows, kVectorElements<T>)) {
      sums.template add_tile<true>(windows, bits, pivot);
    } else {
      sums.template add_tile<false>(windows, bits, pivot);
    }
  });
  if (sums.needs_rescue()) sum_rescued<kIsKept>(x, walker, kept, first, count, pivot, sums);
}

// kFused: there is an epilogue.
template <typename T, Layout kLayout, bool kFused>
BNK_KERNEL_BESIDE(resident_threads(kLayout), kResidentBlocks)
resident_forward_kernel(ResidentForwardParams params) {
  using Walker_ = ResidentWalker<T, kLayout>;
  using Real = Compute<T>;
  constexpr int kTile = kResidentTile;
  constexpr int kColumns = Walker_::kColumns;
  constexpr int kElements = Walker_::kElements;
  constexpr int kSlabChannels = kMaxSlabChannels<kLayout>;
  BNK_SHARED(double, slots, (kResidentSlots<T, kLayout>));
  BNK_SHARED(Sums, totals, kSlabChannels);
  BNK_SHARED(Moments, told, kToldSlabs * kSlabChannels);
  BNK_SHARED(Real, pivots, kSlabChannels);
  BNK_SHARED(Real, means, kSlabChannels);
  BNK_SHARED(Real, invstds, kSlabChannels);
  BNK_SHARED(Real, weights, kSlabChannels);
  BNK_SHARED(Real, biases, kSlabChannels);
  BNK_DYNAMIC_SHARED(Vector<T>, dynamic);
  static_assert(sizeof slots + sizeof totals + sizeof told + 5 * sizeof pivots <= resident_overhead(kLayout));
  const Kept<T> kept{dynamic};

  const Walk& walk = params.walk;
  const Residence& residence = params.residence;
  const Member member = member_of(residence);
  const T* lead = static_cast<const T*>(params.x);
  const T* more = kFused ? static_cast<const T*>(params.epilogue.residual) : nullptr;
  T* out = static_cast<T*>(params.y);
  const View<const T, kLayout> x{lead, elements_of(walk), Walker_::is_wide(walk, lead, lead)};
  // The result and what is added to it are wide together: what the steps keep in registers leaves no room for more.
  const bool added_wide = more == nullptr || Walker_::is_wide(walk, more, lead);
  const View<T, kLayout> y{out, elements_of(walk), added_wide && Walker_::is_wide(walk, out, lead)};
  const bool whole = Walker_::is_whole(walk) && x.wide && y.wide;

  for (int slab = member.group; slab < walk.slabs.value; slab += residence.groups) {
    const auto channel_of = [&](int local) { return first_channel(walk, slab) + local; };
    Walker_ walker(walk, {slab, member.rank}, lead);

    // 1. The share, and the pivots.
    Deviations<T, kColumns> sums;
    sums.clear();
    visit_tiles<kTile, kForwardLoadTile>(walker, 0, residence.kept, whole, [&](const auto& windows, int first) {
      constexpr int kCount = kWindows<decltype(windows)>;
      Vector<T> bits[kCount];
      load_tile<Reuse::kLast>(x, windows, bits);
      keep_tile(kept, windows, first, bits);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        Real values[kElements];
        unpack_window(bits[i], windows[i], values);
#pragma unroll
        for (int element = 0; element < kElements; ++element) sums.first[element] += values[element];
      }
    });
    const Real zero[kColumns] = {};
    if (sums.needs_rescue()) sum_rescued<true>(x, walker, kept, 0, residence.kept, zero, sums);
    const auto sum_of = [&](int element) { return sums(element).first; };
    reduce_slab<T>(walk, walker, slab, sum_of, slots, [&](int local, double all) {
      pivots[local] = static_cast<Real>(all / static_cast<double>(walker.elements_of_first(residence.kept)));
    });

    // 2. The deviations from them.
    const auto sum = [&](int first, int count) {
      Real pivot[kColumns];
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        pivot[column] = walker.has_channel(column) ? pivots[walker.local(column)] : Real(0);
      }
      if (first == 0) {
        sum_deviations<true>(x, walker, whole, kept, first, count, pivot, sums);
      } else {
        sum_deviations<false>(x, walker, whole, kept, first, count, pivot, sums);
      }
    };
    sum_share(walk, walker, slab, residence.kept, slots_of<Sums>(slots), totals, sum, sums);

    // 3. The statistics.
    const auto set = [&](int local, double mean, double invstd) {
      const int64_t channel = channel_of(local);
      means[local] = static_cast<Real>(mean);
      invstds[local] = static_cast<Real>(invstd);
      weights[local] = static_cast<Real>(read_or(params.weight, channel, 1));
      biases[local] = static_cast<Real>(read_or(params.bias, channel, 0));
      expect_uniform(channel, means[local]);
      expect_uniform(channel, invstds[local]);
    };
    const auto finish = [&](int local, const Moments& all) {
      expect_uniform(channel_of(local), all.mean);
      expect_uniform(channel_of(local), all.m2);
      set(local, all.mean, invstd_of(params.results, all));
      if (residence.divided || member.rank == 0) {
        const int64_t batches = params.results.cumulative ? load(params.num_batches_tracked) + 1 : 0;
        write_statistics(params.results, channel_of(local), all, running_factor(params.results, batches));
      }
    };
    const auto mine = [&](int local) {
      const Sums all = totals[local];
      const double count = static_cast<double>(walker.elements());
      const double shift = all.first / count;
      const double m2 = fused_multiply_add(-shift, all.first, all.second);
      return Moments{count, static_cast<double>(pivots[local]) + shift, m2 < 0 ? 0 : m2};
    };
    const auto recall = [&](int local) {
      const int64_t channel = channel_of(local);
      set(local, read(params.results.mean, channel), read(params.results.invstd, channel));
    };
    exchange<kLayout>(residence, walk, member, slab, told, slots_of<Moments>(slots), mine, finish, recall);

    // 4. The result.
    Real mean[kColumns], invstd[kColumns], weight[kColumns], bias[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      // A column that is not there gets another's: nothing is written of it, and a branch would cost a register.
      const int local = walker.has_channel(column) ? walker.local(column) : 0;
      mean[column] = means[local];
      invstd[column] = invstds[local];
      weight[column] = weights[local];
      bias[column] = biases[local];
    }
    const View<const T, kLayout> residual{more, y.elements, y.wide};
    visit_again<kTile>(walker, residence.kept, whole, [&](const auto& windows, int first, auto is_kept) {
      Vector<T> bits[kTile];
      [[maybe_unused]] ResidualTile<T, kTile, is_kept.value> added;
      if constexpr (kFused) added.load(residual, windows);
      if constexpr (is_kept.value) {
        fetch_tile(kept, windows, first, bits);
      } else {
        load_tile<Reuse::kLast>(x, windows, bits);
      }
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        Real values[kElements];
        unpack_window(bits[i], windows[i], values);
#pragma unroll
        for (int element = 0; element < kElements; ++element) {
          const int column = element % kColumns;
          values[element] = normalized(values[element], mean[column], invstd[column], weight[column], bias[column]);
        }
        if constexpr (kFused) {
          added.add(residual, windows, i, values);
          relu(params.epilogue.relu, values);
        }
        store_window(y, windows[i], values);
      }
    });

    // While the results are under way. The next slab's values come behind barriers.
    if constexpr (kFused) {
      if (params.epilogue.low.data == nullptr || member.rank != 0) continue;
      for (int local = static_cast<int>(thread_rank()); local < channels_of(walk, slab);
           local += static_cast<int>(block_threads())) {
        write_relu_range<T>(params.epilogue, channel_of(local), means[local], invstds[local], weights[local],
                            biases[local]);
      }
    }
  }

  leave(residence);
  if (params.num_batches_tracked == nullptr) return;
  // Every thread has read a cumulative average's count, before a barrier of its block, when the last block here counts this
  // batch.
  const bool counts = params.results.cumulative ? last_of_launch(residence) : block_rank() == 0 && thread_rank() == 0;
  if (counts) store(params.num_batches_tracked, load(params.num_batches_tracked) + 1);
}

}  // namespace bnk
