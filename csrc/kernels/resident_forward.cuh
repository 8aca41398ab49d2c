// Forward training in one launch: x is read once, y written once (Ioffe & Szegedy 2015, Algorithm 1).
//
// A group of blocks owns a slab of channels, a block its share of it (plan.h). For each slab, a block
//
//   1. loads its share, keeps it on chip, and takes the mean of what it kept: the pivot p of each channel
//   2. sums d = x - p and d^2 from there:  mean = p + sum(d)/n,  m2 = sum(d^2) - sum(d)^2/n.  The pivot is a mean of at least
//      an eighth of the share, so that what is subtracted is small or, where the rest lies elsewhere, part of the variance
//   3. tells its group its moments and joins those of all members (resident.cuh)
//   4. writes  y = (x - mean) * (invstd * weight) + bias  from what it kept
//
// What it could not keep is read in step 2 and, last first, in step 4. A thread sums a few hundred values at most in the
// elements' compute type, then in double; where that overflows (finite floats whose squares do not fit), again in double.
#pragma once

#include "resident.cuh"
#include "statistics_results.cuh"
#include "sums.cuh"

namespace bnk {

struct ResidentForwardParams {
  Walk walk;
  Residence residence;
  const void* x;
  void* y;
  ConstPerChannel weight;
  ConstPerChannel bias;
  int64_t* num_batches_tracked;  // or null
  StatisticsResults results;
};

// Sums what a thread has kept, by element of a window.
template <typename T, Layout kLayout>
BNK_DEVICE void sum_kept_in_double(Walker<T, kLayout> walker, const Kept<T>& kept, int count,
                                   double (&sum)[kVectorElements<T>]) {
  walker.seek(0);
  for (int window = 0; window < count && walker.more(); ++window) {
    Compute<T> values[kVectorElements<T>];
    unpack_window(kept[window], walker.next(), values);
#pragma unroll
    for (int i = 0; i < kVectorElements<T>; ++i) sum[i] += values[i];
  }
}

// Sums of d and d^2, by element of a window.
template <typename Real, int kElements>
struct Deviations {
  Real sum[kElements] = {};
  Real squares[kElements] = {};

  // kFull: all elements of all windows are there.
  template <bool kFull, typename T, int kTile, int kColumns>
  BNK_DEVICE void add(const Window (&windows)[kTile], const Vector<T> (&bits)[kTile],
                      const Compute<T> (&pivot)[kColumns]) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      Compute<T> values[kElements];
      widen_vector(bits[i], values);
#pragma unroll
      for (int element = 0; element < kElements; ++element) {
        if (!kFull && (element < windows[i].begin || element >= windows[i].end)) continue;
        const Real deviation = values[element] - pivot[element % kColumns];
        sum[element] += deviation;
        squares[element] = fused_multiply_add(deviation, deviation, squares[element]);
      }
    }
  }

  template <typename T, int kTile, int kColumns>
  BNK_DEVICE void add(const Window (&windows)[kTile], const Vector<T> (&bits)[kTile],
                      const Compute<T> (&pivot)[kColumns]) {
    if (all_full(windows, kElements)) {
      add<true>(windows, bits, pivot);
    } else {
      add<false>(windows, bits, pivot);
    }
  }

  // False if a sum is not finite.
  BNK_DEVICE bool add_to(Sums (&total)[kElements]) const {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      join(total[i], {static_cast<double>(sum[i]), static_cast<double>(squares[i])});
    }
    return all_finite(sum) & all_finite(squares);
  }
};

// Of all of a thread's windows: of the kept ones in one chain of the compute type, of the others by the tile. False if a
// sum is not finite.
template <typename T, Layout kLayout, int kColumns>
BNK_DEVICE bool sum_deviations(const View<const T>& x, Walker<T, kLayout> walker, const Kept<T>& kept, int count,
                               const Compute<T> (&pivot)[kColumns], Sums (&total)[kVectorElements<T>]) {
  constexpr int kTile = kResidentTile;
  constexpr int kElements = kVectorElements<T>;
  walker.seek(0);
  Deviations<Compute<T>, kElements> of_kept;
  for (int window = 0; window < count && walker.more(); window += kTile) {
    Window windows[kTile];
    Vector<T> bits[kTile];
    next_tile(walker, windows);
    fetch_tile(kept, window, bits);
    of_kept.add(windows, bits, pivot);
  }
#pragma unroll
  for (int i = 0; i < kElements; ++i) total[i] = {};
  bool finite = of_kept.add_to(total);
  while (walker.more()) {
    Window windows[kSpilledTile];
    Vector<T> bits[kSpilledTile];
    next_tile(walker, windows);
    load_tile<Reuse::kAgain>(x, windows, bits);
    Deviations<Compute<T>, kElements> of_tile;
    of_tile.add(windows, bits, pivot);
    finite &= of_tile.add_to(total);
  }
  return finite;
}

// The same in double, a window at a time.
template <typename T, Layout kLayout, int kColumns>
BNK_DEVICE void sum_deviations_in_double(const View<const T>& x, Walker<T, kLayout> walker, const Kept<T>& kept,
                                         int count, const Compute<T> (&pivot)[kColumns],
                                         Sums (&total)[kVectorElements<T>]) {
  walker.seek(0);
#pragma unroll
  for (int i = 0; i < kVectorElements<T>; ++i) total[i] = {};
  for (int number = 0; walker.more(); ++number) {
    const Window window = walker.next();
    const Vector<T> bits = number < count ? kept[number] : load_window<Reuse::kAgain>(x, window);
    Compute<T> values[kVectorElements<T>];
    widen_vector(bits, values);
#pragma unroll
    for (int i = 0; i < kVectorElements<T>; ++i) {
      if (i < window.begin || i >= window.end) continue;
      const double deviation = static_cast<double>(values[i]) - static_cast<double>(pivot[i % kColumns]);
      join(total[i], {deviation, deviation * deviation});
    }
  }
}

template <typename T, Layout kLayout>
BNK_KERNEL_BESIDE(kMaxBlockThreads, kResidentBlocks)
resident_forward_kernel(ResidentForwardParams params) {
  using Walker_ = Walker<T, kLayout>;
  using Real = Compute<T>;
  constexpr int kTile = kResidentTile;
  constexpr int kColumns = Walker_::kColumns;
  constexpr int kElements = Walker_::kElements;
  constexpr int kSlabChannels = kLayout == Layout::kChannelsFirst ? 1 : kMaxSlabChannels;
  BNK_SHARED(double, slots, (kResidentSlots<T, kLayout>));
  BNK_SHARED(Real, pivots, kSlabChannels);
  BNK_SHARED(Real, means, kSlabChannels);
  BNK_SHARED(Real, scales, kSlabChannels);
  BNK_SHARED(Real, biases, kSlabChannels);
  BNK_DYNAMIC_SHARED(Vector<T>, dynamic);
  const Kept<T> kept{dynamic};

  const Walk& walk = params.walk;
  const Residence& residence = params.residence;
  const Member member = member_of(residence);
  const T* lead = static_cast<const T*>(params.x);
  T* out = static_cast<T*>(params.y);
  const View<const T> x{lead, elements_of(walk), Walker_::is_wide(walk, lead, lead)};
  const View<T> y{out, elements_of(walk), Walker_::is_wide(walk, out, lead)};

  for (int64_t slab = member.group; slab < walk.slabs.value; slab += residence.groups) {
    const int64_t first_channel = slab * walk.slab_channels;
    Walker_ walker(walk, {slab, member.rank}, lead);

    // 1. The share, and the pivots.
    Real sum[kElements] = {};
    for (int window = 0; window < residence.kept && walker.more(); window += kTile) {
      Window windows[kTile];
      Vector<T> bits[kTile];
      next_tile(walker, windows);
      load_tile<Reuse::kLast>(x, windows, bits);
      keep_tile(kept, window, bits);
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        Real values[kElements];
        unpack_window(bits[i], windows[i], values);
#pragma unroll
        for (int element = 0; element < kElements; ++element) sum[element] += values[element];
      }
    }
    double kept_sum[kElements] = {};
    if (all_finite(sum)) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) kept_sum[i] = static_cast<double>(sum[i]);
    } else {
      sum_kept_in_double(walker, kept, residence.kept, kept_sum);
    }
    reduce_slab<T>(walk, walker, slab, kept_sum, slots, [&](int local, double all) {
      pivots[local] = static_cast<Real>(all / static_cast<double>(walker.elements_of_first(residence.kept)));
    });

    // 2. The deviations from them.
    Real pivot[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      pivot[column] = walker.has_channel(column) ? pivots[walker.local(column)] : Real(0);
    }
    Sums deviations[kElements];
    if (!sum_deviations(x, walker, kept, residence.kept, pivot, deviations)) {
      sum_deviations_in_double(x, walker, kept, residence.kept, pivot, deviations);
    }

    // 3. The statistics.
    const double count = static_cast<double>(walker.elements());
    const int64_t batches = params.results.cumulative ? load(params.num_batches_tracked) + 1 : 0;
    const auto set = [&](int local, double mean, double invstd) {
      const int64_t channel = first_channel + local;
      means[local] = static_cast<Real>(mean);
      scales[local] = static_cast<Real>(invstd * read_or(params.weight, channel, 1));
      biases[local] = static_cast<Real>(read_or(params.bias, channel, 0));
    };
    const auto finish = [&](int local, const Moments& all) {
      set(local, all.mean, invstd_of(params.results, all));
      if (residence.divided || member.rank == 0) {
        write_statistics(params.results, first_channel + local, all, running_factor(params.results, batches));
      }
    };
    reduce_slab<T>(walk, walker, slab, deviations, slots_of<Sums>(slots), [&](int local, const Sums& all) {
      const double shift = all.first / count;
      const double m2 = fused_multiply_add(-shift, all.first, all.second);
      const Moments moments{count, static_cast<double>(pivots[local]) + shift, m2 < 0 ? 0 : m2};
      if (residence.members == 1) {
        finish(local, moments);
      } else {
        store_partial(residence.partial, walk, member.rank, first_channel + local, moments);
      }
    });
    if (residence.members > 1) {
      exchange(residence, walk, member, slab, slots_of<Moments>(slots), finish, [&](int local) {
        const int64_t channel = first_channel + local;
        set(local, read(params.results.mean, channel), read(params.results.invstd, channel));
      });
    }

    // 4. The result.
    Real mean[kColumns], scale[kColumns], bias[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!walker.has_channel(column)) continue;
      mean[column] = means[walker.local(column)];
      scale[column] = scales[walker.local(column)];
      bias[column] = biases[walker.local(column)];
    }
    visit_reversed<kTile>(walker, residence.kept, [&](const Window(&windows)[kTile], int first, bool is_kept) {
      Vector<T> bits[kTile];
      if (is_kept) {
        fetch_tile(kept, first, bits);
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
          values[element] = fused_multiply_add(values[element] - mean[column], scale[column], bias[column]);
        }
        store_window(y, windows[i], values);
      }
    });
  }

  if (params.num_batches_tracked == nullptr) return;
  // Every thread has read a cumulative average's count, before a reduction's barriers, when the last block here counts this
  // batch.
  const bool counts = params.results.cumulative ? last_of_launch(residence) : block_rank() == 0 && thread_rank() == 0;
  if (counts) store(params.num_batches_tracked, load(params.num_batches_tracked) + 1);
}

}  // namespace bnk
