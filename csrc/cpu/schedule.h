// Schedule: assigns the pieces of a tiling to threads, in an order that reuses the cache.
//
// There are three steps: compute the statistics of every split; combine a channel's splits and compute its
// coefficients; write the result, with splits in reverse order, so that the data read last is still in the cache. There
// are two modes, with the same bits:
//
//   owned   each thread takes whole blocks of channels through all three steps, without sharing or waiting
//   shared  all threads work on the splits of a group of blocks that fits the cache: for few channels, or large ones
//
// Without statistics only the last step remains, and its pieces are visited in memory order.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

#include "tiling.h"

namespace bnk::cpu {

constexpr int64_t kSerialElements = 32768;  // below, starting threads costs more than it saves

inline int threads_for(int64_t elements) {
  return elements <= kSerialElements || at::in_parallel_region() ? 1 : at::get_num_threads();
}

// Calls f(piece) for all pieces in [0, pieces); each thread gets a contiguous range of them.
template <typename F>
void over_pieces(int threads, int64_t pieces, const F& f) {
  if (threads == 1 || pieces == 1) {
    for (int64_t piece = 0; piece < pieces; ++piece) f(piece);
    return;
  }
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) f(piece);
  });
}

template <typename F>
void over_pieces_reversed(int threads, int64_t pieces, const F& f) {
  if (threads == 1 || pieces == 1) {
    for (int64_t piece = pieces; piece-- > 0;) f(piece);
    return;
  }
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = end; piece-- > begin;) f(piece);
  });
}

// The combined per-channel statistics of some splits, and their number of elements per channel.
struct Merged {
  Partial* partials;
  double count;
};

// Combines splits [first, last) pairwise, so that rounding errors grow with the depth of the tree rather than with the
// number of splits. The tree depends only on that number. leaf(split, depth) returns a split's partials, which may be
// overwritten; they must stay valid until the next call of leaf with the same depth or a smaller one.
template <typename Work, typename Leaf>
Merged combine_splits(const Tiling& tiling, const Work& work, int64_t channels, int64_t first, int64_t last, int depth,
                      const Leaf& leaf) {
  if (last - first == 1) return {leaf(first, depth), tiling.count(first)};
  int64_t half = 1;
  while (2 * half < last - first) half *= 2;
  const Merged left = combine_splits(tiling, work, channels, first, first + half, depth, leaf);
  const Merged right = combine_splits(tiling, work, channels, first + half, last, depth + 1, leaf);
  for (int64_t c = 0; c < channels; ++c) {
    work.merge(&left.partials[c], left.count, right.partials[c], right.count);
  }
  return {left.partials, left.count + right.count};
}

// The number of depths for which combine_splits requests leaves.
inline int merge_depths(int64_t splits) {
  int depths = 1;
  for (int64_t merged = 1; merged < splits; merged *= 2) ++depths;
  return depths;
}

// Computes results that need no statistics: calls apply(block, split) for all pieces.
template <typename Apply>
void run_apply(const Tiling& tiling, int64_t elements, const Apply& apply) {
  const int64_t blocks = tiling.blocks();
  over_pieces(threads_for(elements), blocks * tiling.splits(),
              [&](int64_t piece) { apply(piece % blocks, piece / blocks); });
}

// Work provides partials(block, split, Partial*), merge(Partial* into, double before, const Partial&, double count),
// finalize(channel, const Partial&), apply(block, split) and the flag has_apply. block_bytes: the bytes that a block
// reads and writes.
//
// All scratch memory is allocated before any result is written, so a call that runs out of memory changes nothing.
template <typename Work>
void run(const Tiling& tiling, const Work& work, int64_t elements, int64_t block_bytes) {
  const int threads = threads_for(elements);
  const int64_t blocks = tiling.blocks();
  const int64_t splits = tiling.splits();

  const int64_t rounds = (blocks + threads - 1) / threads;
  const bool balanced = 5 * blocks >= 4 * rounds * threads;
  if (threads == 1 || (balanced && block_bytes * threads <= kCacheBytes)) {
    // Per-thread scratch, padded so that neighbours do not share a cache line.
    const int64_t scratch = (merge_depths(splits) * tiling.block_channels() + 7) / 8 * 8;
    const std::unique_ptr<Partial[]> by_thread(new Partial[static_cast<size_t>(scratch * threads)]);
    over_pieces(threads, blocks, [&](int64_t block) {
      const int64_t first = tiling.first_channel(block);
      const int64_t channels = tiling.last_channel(block) - first;
      Partial* by_depth = by_thread.get() + (threads == 1 || blocks == 1 ? 0 : at::get_thread_num() * scratch);
      const Merged all = combine_splits(tiling, work, channels, 0, splits, 0, [&](int64_t split, int depth) {
        Partial* partials = by_depth + depth * channels;
        work.partials(block, split, partials);
        return partials;
      });
      for (int64_t c = 0; c < channels; ++c) work.finalize(first + c, all.partials[c]);
      if (!work.has_apply) return;
      for (int64_t split = splits; split-- > 0;) work.apply(block, split);
    });
    return;
  }

  const int64_t group = std::clamp<int64_t>(kCacheBytes / block_bytes, 1, blocks);
  const int64_t width = tiling.block_channels();
  const std::unique_ptr<Partial[]> partials(new Partial[static_cast<size_t>(group * splits * width)]);
  for (int64_t base = 0; base < blocks; base += group) {
    const int64_t here = std::min(group, blocks - base);
    over_pieces(threads, here * splits, [&](int64_t piece) {
      work.partials(base + piece / splits, piece % splits, partials.get() + piece * width);
    });
    over_pieces(here * splits * width < 4096 ? 1 : threads, here, [&](int64_t block) {
      Partial* of_block = partials.get() + block * splits * width;
      const int64_t first = tiling.first_channel(base + block);
      const int64_t channels = tiling.last_channel(base + block) - first;
      const Merged all = combine_splits(tiling, work, channels, 0, splits, 0,
                                        [&](int64_t split, int) { return of_block + split * width; });
      for (int64_t c = 0; c < channels; ++c) work.finalize(first + c, all.partials[c]);
    });
    if (!work.has_apply) continue;
    over_pieces_reversed(threads, here * splits,
                         [&](int64_t piece) { work.apply(base + piece / splits, piece % splits); });
  }
}

}  // namespace bnk::cpu
