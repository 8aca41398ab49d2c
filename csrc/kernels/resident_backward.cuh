// Backward of training in one launch: grad_y and x are read once, grad_x is written once.
//
// With g = grad_y and xhat = (x - mean) * invstd, for each of its slabs a group of blocks (plan.h)
//
//   1. loads g and x, keeps them on chip, and sums g and g*(x - mean)
//   2. exchanges the sums (resident.cuh):  grad_bias = sum(g),  grad_weight = sum(g*(x - mean)) * invstd
//   3. writes  grad_x = (g - mean(g) - xhat * mean(g*xhat)) * (weight * invstd)  from what it kept
//
// What a block could not keep is read in step 1 and, last first, in step 3. Where a product or a sum overflows (finite floats
// whose product does not fit), a thread sums again in double.
#pragma once

#include "per_channel.cuh"
#include "resident.cuh"

namespace bnk {

struct ResidentBackwardParams {
  Walk walk;
  Residence residence;
  const void* grad_y;
  const void* x;
  void* grad_x;
  ConstPerChannel weight;
  ConstPerChannel mean;
  ConstPerChannel invstd;
  double elements_per_channel;
  PerChannel grad_weight;  // or null
  PerChannel grad_bias;    // or null
  PerChannel mean_g;       // double; where the exchange is divided
  PerChannel mean_g_xhat;  // double; where the exchange is divided
};

// Sums of g and of g*(x - mean), by element of a window.
template <typename Real, int kElements>
struct Products {
  Real sum[kElements] = {};
  Real product[kElements] = {};

  // kFull: all elements of all windows are there. One that is not there adds nothing, whatever the channel's statistics.
  template <bool kFull, typename T, int kTile, int kColumns>
  BNK_DEVICE void add(const Window (&windows)[kTile], const Vector<T> (&x_bits)[kTile],
                      const Vector<T> (&g_bits)[kTile], const Real (&mean)[kColumns]) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      Real xs[kElements], gs[kElements];
      widen_vector(x_bits[i], xs);
      widen_vector(g_bits[i], gs);
#pragma unroll
      for (int element = 0; element < kElements; ++element) {
        if (!kFull && (element < windows[i].begin || element >= windows[i].end)) continue;
        sum[element] += gs[element];
        product[element] = fused_multiply_add(gs[element], xs[element] - mean[element % kColumns], product[element]);
      }
    }
  }

  template <typename T, int kTile, int kColumns>
  BNK_DEVICE void add(const Window (&windows)[kTile], const Vector<T> (&x_bits)[kTile],
                      const Vector<T> (&g_bits)[kTile], const Real (&mean)[kColumns]) {
    if (all_full(windows, kElements)) {
      add<true>(windows, x_bits, g_bits, mean);
    } else {
      add<false>(windows, x_bits, g_bits, mean);
    }
  }

  // False if a sum is not finite.
  BNK_DEVICE bool add_to(Sums (&total)[kElements]) const {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      join(total[i], {static_cast<double>(sum[i]), static_cast<double>(product[i])});
    }
    return all_finite(sum) & all_finite(product);
  }
};

// Of all of a thread's windows in double, one at a time.
template <typename T, Layout kLayout, int kColumns>
BNK_DEVICE void sum_products_in_double(const View<const T>& x, const View<const T>& g, Walker<T, kLayout> walker,
                                       const Kept<T>& kept_x, const Kept<T>& kept_g, int count,
                                       const Compute<T> (&mean)[kColumns], Sums (&total)[kVectorElements<T>]) {
  walker.seek(0);
#pragma unroll
  for (int i = 0; i < kVectorElements<T>; ++i) total[i] = {};
  for (int number = 0; walker.more(); ++number) {
    const Window window = walker.next();
    const bool is_kept = number < count;
    const Vector<T> x_bits = is_kept ? kept_x[number] : load_window<Reuse::kAgain>(x, window);
    const Vector<T> g_bits = is_kept ? kept_g[number] : load_window<Reuse::kAgain>(g, window);
    Compute<T> xs[kVectorElements<T>], gs[kVectorElements<T>];
    widen_vector(x_bits, xs);
    widen_vector(g_bits, gs);
#pragma unroll
    for (int i = 0; i < kVectorElements<T>; ++i) {
      if (i < window.begin || i >= window.end) continue;
      const double grad = static_cast<double>(gs[i]);
      const double deviation = static_cast<double>(xs[i]) - static_cast<double>(mean[i % kColumns]);
      join(total[i], {grad, grad * deviation});
    }
  }
}

template <typename T, Layout kLayout>
BNK_KERNEL_BESIDE(kMaxBlockThreads, kResidentBlocks)
resident_backward_kernel(ResidentBackwardParams params) {
  using Walker_ = Walker<T, kLayout>;
  using Real = Compute<T>;
  constexpr int kTile = kResidentTile;
  constexpr int kColumns = Walker_::kColumns;
  constexpr int kElements = Walker_::kElements;
  constexpr int kSlabChannels = kLayout == Layout::kChannelsFirst ? 1 : kMaxSlabChannels;
  BNK_SHARED(double, slots, (kResidentSlots<T, kLayout>));
  BNK_SHARED(Real, invstds, kSlabChannels);
  BNK_SHARED(Real, scales, kSlabChannels);
  BNK_SHARED(Real, means_g, kSlabChannels);
  BNK_SHARED(Real, means_g_xhat, kSlabChannels);
  BNK_DYNAMIC_SHARED(Vector<T>, dynamic);

  const Walk& walk = params.walk;
  const Residence& residence = params.residence;
  const Kept<T> kept_x{dynamic};
  const Kept<T> kept_g{dynamic + residence.kept * static_cast<int>(block_threads())};
  const Member member = member_of(residence);
  const T* lead = static_cast<const T*>(params.x);
  const T* grad = static_cast<const T*>(params.grad_y);
  T* out = static_cast<T*>(params.grad_x);
  const View<const T> x{lead, elements_of(walk), Walker_::is_wide(walk, lead, lead)};
  const View<const T> g{grad, elements_of(walk), Walker_::is_wide(walk, grad, lead)};
  const View<T> grad_x{out, elements_of(walk), Walker_::is_wide(walk, out, lead)};

  for (int64_t slab = member.group; slab < walk.slabs.value; slab += residence.groups) {
    const int64_t first_channel = slab * walk.slab_channels;
    Walker_ walker(walk, {slab, member.rank}, lead);
    Real mean[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!walker.has_channel(column)) continue;
      mean[column] = static_cast<Real>(read(params.mean, walker.channel(column)));
    }

    // 1. The share, and its sums.
    Sums total[kElements];
    bool finite;
    {
      Products<Real, kElements> of_kept;
      for (int window = 0; window < residence.kept && walker.more(); window += kTile) {
        Window windows[kTile];
        Vector<T> x_bits[kTile], g_bits[kTile];
        next_tile(walker, windows);
        load_tile<Reuse::kLast>(x, windows, x_bits);
        load_tile<Reuse::kLast>(g, windows, g_bits);
        keep_tile(kept_x, window, x_bits);
        keep_tile(kept_g, window, g_bits);
        of_kept.add(windows, x_bits, g_bits, mean);
      }
#pragma unroll
      for (int i = 0; i < kElements; ++i) total[i] = {};
      finite = of_kept.add_to(total);
    }
    while (walker.more()) {
      Window windows[kSpilledTile];
      Vector<T> x_bits[kSpilledTile], g_bits[kSpilledTile];
      next_tile(walker, windows);
      load_tile<Reuse::kAgain>(x, windows, x_bits);
      load_tile<Reuse::kAgain>(g, windows, g_bits);
      Products<Real, kElements> of_tile;
      of_tile.add(windows, x_bits, g_bits, mean);
      finite &= of_tile.add_to(total);
    }
    if (!finite) sum_products_in_double(x, g, walker, kept_x, kept_g, residence.kept, mean, total);

    // 2. Of the whole channel.
    const auto set = [&](int local, double mean_g, double mean_g_xhat) {
      const int64_t channel = first_channel + local;
      const double invstd = read(params.invstd, channel);
      invstds[local] = static_cast<Real>(invstd);
      scales[local] = static_cast<Real>(read_or(params.weight, channel, 1) * invstd);
      means_g[local] = static_cast<Real>(mean_g);
      means_g_xhat[local] = static_cast<Real>(mean_g_xhat);
    };
    const auto finish = [&](int local, const Sums& all) {
      const int64_t channel = first_channel + local;
      const double sum_g_xhat = all.second * read(params.invstd, channel);
      const double mean_g = all.first / params.elements_per_channel;
      const double mean_g_xhat = sum_g_xhat / params.elements_per_channel;
      set(local, mean_g, mean_g_xhat);
      if (!residence.divided && member.rank != 0) return;
      write(params.grad_bias, channel, all.first);
      write(params.grad_weight, channel, sum_g_xhat);
      if (!residence.divided) return;
      write(params.mean_g, channel, mean_g);
      write(params.mean_g_xhat, channel, mean_g_xhat);
    };
    reduce_slab<T>(walk, walker, slab, total, slots_of<Sums>(slots), [&](int local, const Sums& all) {
      if (residence.members == 1) {
        finish(local, all);
      } else {
        store_partial(residence.partial, walk, member.rank, first_channel + local, all);
      }
    });
    if (residence.members > 1) {
      exchange(residence, walk, member, slab, slots_of<Sums>(slots), finish, [&](int local) {
        const int64_t channel = first_channel + local;
        set(local, read(params.mean_g, channel), read(params.mean_g_xhat, channel));
      });
    }

    // 3. The result.
    Real invstd[kColumns], scale[kColumns], mean_g[kColumns], mean_g_xhat[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!walker.has_channel(column)) continue;
      const int local = walker.local(column);
      invstd[column] = invstds[local];
      scale[column] = scales[local];
      mean_g[column] = means_g[local];
      mean_g_xhat[column] = means_g_xhat[local];
    }
    visit_reversed<kSpilledTile>(
        walker, residence.kept, [&](const Window(&windows)[kSpilledTile], int first, bool is_kept) {
          Vector<T> x_bits[kSpilledTile], g_bits[kSpilledTile];
          if (is_kept) {
            fetch_tile(kept_x, first, x_bits);
            fetch_tile(kept_g, first, g_bits);
          } else {
            load_tile<Reuse::kLast>(x, windows, x_bits);
            load_tile<Reuse::kLast>(g, windows, g_bits);
          }
#pragma unroll
          for (int i = 0; i < kSpilledTile; ++i) {
            Real xs[kElements], gs[kElements];
            widen_vector(x_bits[i], xs);
            widen_vector(g_bits[i], gs);
#pragma unroll
            for (int element = 0; element < kElements; ++element) {
              const int column = element % kColumns;
              const Real xhat = (xs[element] - mean[column]) * invstd[column];
              const Real centered = gs[element] - mean_g[column];
              gs[element] = fused_multiply_add(-xhat, mean_g_xhat[column], centered) * scale[column];
            }
            store_window(grad_x, windows[i], gs);
          }
        });
  }
}

}  // namespace bnk
