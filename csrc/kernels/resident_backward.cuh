// Backward of training in one launch: grad_y and x are read once, grad_x is written once.
//
// With g = grad_y, as its gate lets it through, and xhat = (x - mean) * invstd, for each of its slabs a group of blocks (plan.h)
//
//   1. loads grad_y and x, keeps them on chip, and sums g and g*(x - mean)
//   2. exchanges the sums (resident.cuh):  grad_bias = sum(g),  grad_weight = sum(g*(x - mean)) * invstd
//   3. writes  grad_x = (g - mean(g) - (x - mean) * slope) * scale  from what it kept, where slope = mean(g*xhat) * invstd
//      and scale = weight * invstd
//
// What a block could not keep is read in step 1 and, last first, in step 3.
#pragma once

#include "relu_gate.cuh"
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
  PerChannel grad_weight;    // or null
  PerChannel grad_bias;      // or null
  PerChannel mean_g;         // double; where the exchange is divided
  PerChannel mean_g_xhat;    // double; where the exchange is divided
  ConstPerChannel relu_low;  // null: no ReLU
  ConstPerChannel relu_high;
};

// Sums of g and of g*(x - mean), by element of a window.
template <typename T, int kColumns>
struct Products : WindowSums<T> {
  using Real = Compute<T>;
  static constexpr int kElements = kVectorElements<T>;

  BNK_DEVICE void add(int element, Real gradient, Real deviation) {
    this->first[element] += gradient;
    this->second[element] = fused_multiply_add(gradient, deviation, this->second[element]);
  }

  // kFull: all elements of all windows are there. One that is not there adds nothing, whatever the channel's statistics.
  template <bool kFull, typename Window_, int kTile, typename Gate>
  BNK_DEVICE void add_tile(const Window_ (&windows)[kTile], const Vector<T> (&x_bits)[kTile],
                           const Vector<T> (&g_bits)[kTile], const Real (&mean)[kColumns], const Gate& gate) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      Real xs[kElements], gs[kElements];
      widen_vector(x_bits[i], xs);
      widen_vector(g_bits[i], gs);
#pragma unroll
      for (int element = 0; element < kElements; ++element) {
        if (!kFull && (element < windows[i].begin || element >= windows[i].end)) continue;
        add(element, gate(element, xs[element], gs[element]), xs[element] - mean[element % kColumns]);
      }
    }
  }

  // One window, to those that are rescued.
  template <typename Gate>
  BNK_DEVICE void add_rescued(const Window& window, const Vector<T>& x_bits, const Vector<T>& g_bits,
                              const Real (&mean)[kColumns], const Gate& gate) {
    constexpr Real kScale = kRescue<Real>;
    Real xs[kElements], gs[kElements];
    widen_vector(x_bits, xs);
    widen_vector(g_bits, gs);
#pragma unroll
    for (int element = 0; element < kElements; ++element) {
      if (element < window.begin || element >= window.end || !this->is_rescued(element)) continue;
      add(element, gate(element, xs[element], gs[element]) * kScale,
          xs[element] * kScale - mean[element % kColumns] * kScale);
    }
  }
};

// Sums a thread's windows first .. first + count - 1 again, to the elements that are rescued.
template <typename T, Layout kLayout, int kColumns, typename Gate>
BNK_DEVICE void sum_rescued(const View<const T, kLayout>& x, const View<const T, kLayout>& g,
                            ResidentWalker<T, kLayout>& walker, int first, int count,
                            const Compute<T> (&mean)[kColumns], const Gate& gate, Products<T, kColumns>& sums) {
  walker.seek(first);
  for (int number = first; number < first + count && walker.more(); ++number) {
    const Window window = walker.next();
    sums.add_rescued(window, load_window<Reuse::kAgain>(x, window), load_window<Reuse::kAgain>(g, window), mean, gate);
  }
}

// kGated: the forward ended with a ReLU.
template <typename T, Layout kLayout, bool kGated>
BNK_KERNEL_BESIDE(resident_threads(kLayout), kResidentBlocks)
resident_backward_kernel(ResidentBackwardParams params) {
  using Walker_ = ResidentWalker<T, kLayout>;
  using Real = Compute<T>;
  constexpr int kTile = kResidentTile;
  constexpr int kColumns = Walker_::kColumns;
  // The coefficients of a gate, one for each column, leave registers for fewer windows.
  constexpr int kResultTile = kGated && kColumns > 1 ? 1 : kTile;
  constexpr int kElements = Walker_::kElements;
  constexpr int kSlabChannels = kMaxSlabChannels<kLayout>;
  BNK_SHARED(double, slots, (kResidentSlots<T, kLayout>));
  BNK_SHARED(Sums, totals, kSlabChannels);
  BNK_SHARED(Sums, told, kToldSlabs * kSlabChannels);
  BNK_SHARED(Real, scales, kSlabChannels);
  BNK_SHARED(Real, means_g, kSlabChannels);
  BNK_SHARED(Real, slopes, kSlabChannels);
  BNK_DYNAMIC_SHARED(Vector<T>, dynamic);
  static_assert(sizeof slots + sizeof totals + sizeof told + 3 * sizeof scales <= resident_overhead(kLayout));

  const Walk& walk = params.walk;
  const Residence& residence = params.residence;
  const Kept<T> kept_x{dynamic};
  const Kept<T> kept_g{dynamic + residence.kept * static_cast<int>(block_threads())};
  const Member member = member_of(residence);
  const T* lead = static_cast<const T*>(params.x);
  const T* grad = static_cast<const T*>(params.grad_y);
  T* out = static_cast<T*>(params.grad_x);
  const View<const T, kLayout> x{lead, elements_of(walk), Walker_::is_wide(walk, lead, lead)};
  const View<const T, kLayout> g{grad, elements_of(walk), Walker_::is_wide(walk, grad, lead)};
  const View<T, kLayout> grad_x{out, elements_of(walk), Walker_::is_wide(walk, out, lead)};
  const bool whole = Walker_::is_whole(walk) && x.wide && g.wide && grad_x.wide;

  for (int slab = member.group; slab < walk.slabs.value; slab += residence.groups) {
    const auto channel_of = [&](int local) { return first_channel(walk, slab) + local; };
    Walker_ walker(walk, {slab, member.rank}, lead);
    Real mean[kColumns];
    GateIf<kGated, Real, kColumns> gate;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!walker.has_channel(column)) continue;
      mean[column] = static_cast<Real>(read(params.mean, walker.channel(column)));
      gate.read_channel(params.relu_low, params.relu_high, column, walker.channel(column));
    }

    // 1. The share, and its sums.
    Products<T, kColumns> sums;
    const auto sum = [&](int first, int count) {
      const bool keeps = first == 0;
      const HintedLoads loads{keeps ? evict_first() : evict_last()};
      sums.clear();
      visit_tiles<kTile>(walker, first, count, whole, [&](const auto& windows, int number) {
        Vector<T> x_bits[kTile], g_bits[kTile];
        load_tile(x, windows, x_bits, loads);
        load_tile(g, windows, g_bits, loads);
        if (keeps) {
          keep_tile(kept_x, windows, number, x_bits);
          keep_tile(kept_g, windows, number, g_bits);
        }
        if (all_full(windows, kElements)) {
          sums.template add_tile<true>(windows, x_bits, g_bits, mean, gate);
        } else {
          sums.template add_tile<false>(windows, x_bits, g_bits, mean, gate);
        }
      });
      if (sums.needs_rescue()) sum_rescued(x, g, walker, first, count, mean, gate, sums);
    };
    sum_share(walk, walker, slab, residence.kept, slots_of<Sums>(slots), totals, sum, sums);

    // 2. Of the whole channel.
    const auto set = [&](int local, double mean_g, double mean_g_xhat) {
      const int64_t channel = channel_of(local);
      const double invstd = read(params.invstd, channel);
      scales[local] = static_cast<Real>(read_or(params.weight, channel, 1) * invstd);
      means_g[local] = static_cast<Real>(mean_g);
      slopes[local] = static_cast<Real>(mean_g_xhat * invstd);
      expect_uniform(channel, means_g[local]);
      expect_uniform(channel, slopes[local]);
    };
    const auto finish = [&](int local, const Sums& all) {
      const int64_t channel = channel_of(local);
      expect_uniform(channel, all.first);
      expect_uniform(channel, all.second);
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
    const auto mine = [&](int local) { return totals[local]; };
    const auto recall = [&](int local) {
      const int64_t channel = channel_of(local);
      set(local, read(params.mean_g, channel), read(params.mean_g_xhat, channel));
    };
    exchange<kLayout>(residence, walk, member, slab, told, slots_of<Sums>(slots), mine, finish, recall);

    // 3. The result.
    Real scale[kColumns], mean_g[kColumns], slope[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!walker.has_channel(column)) continue;
      const int local = walker.local(column);
      scale[column] = scales[local];
      mean_g[column] = means_g[local];
      slope[column] = slopes[local];
    }
    visit_again<kResultTile>(walker, residence.kept, whole, [&](const auto& windows, int first, auto is_kept) {
      Vector<T> x_bits[kResultTile], g_bits[kResultTile];
      if constexpr (is_kept.value) {
        fetch_tile(kept_x, windows, first, x_bits);
        fetch_tile(kept_g, windows, first, g_bits);
      } else {
        load_tile<Reuse::kLast>(x, windows, x_bits);
        load_tile<Reuse::kLast>(g, windows, g_bits);
      }
#pragma unroll
      for (int i = 0; i < kResultTile; ++i) {
        Real xs[kElements], gs[kElements];
        widen_vector(x_bits[i], xs);
        widen_vector(g_bits[i], gs);
#pragma unroll
        for (int element = 0; element < kElements; ++element) {
          const int column = element % kColumns;
          const Real deviation = xs[element] - mean[column];
          const Real centered = gate(element, xs[element], gs[element]) - mean_g[column];
          gs[element] = fused_multiply_add(-deviation, slope[column], centered) * scale[column];
        }
        store_window(grad_x, windows[i], gs);
      }
    });
  }
  leave(residence);
}

}  // namespace bnk
