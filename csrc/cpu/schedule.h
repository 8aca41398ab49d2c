// Schedule: which thread computes which piece of a layout, and when.
//
// Three steps: the statistics of every chunk; a channel's chunks merged and its coefficients set; the result, chunks in
// reverse, so that what was read last is still in the cache. Two ways, with the same bits:
//
//   owned   a thread takes whole blocks of channels through all three steps: nothing is shared, no thread waits
//   shared  all threads work on the chunks of a group of blocks, as many as the cache holds: few channels, or large ones
//
// Without statistics there is only the last step, and its pieces are walked as they follow each other in memory.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

#include "layout.h"

namespace bnk::cpu {

constexpr int64_t kSerialElements = 32768;  // below, starting threads costs more than it saves

inline int threads_for(int64_t elements) {
  return elements <= kSerialElements || at::in_parallel_region() ? 1 : at::get_num_threads();
}

// f(piece) for all pieces in [0, pieces), each thread a contiguous share of them.
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

// The statistics of some chunks, by channel, and how many elements of each channel they are of.
struct Merged {
  Partial* partials;
  double count;
};

// Splits [first, last) merged in pairs: rounding errors grow with the depth of the tree, not with the number of chunks.
// The tree follows from that number alone. leaf(chunk, depth) gives a chunk's partials, which may be overwritten; they are
// needed until another leaf of the same depth, or of less, is asked for.
template <typename Work, typename Leaf>
Merged combine_splits(const Layout& layout, const Work& work, int64_t channels, int64_t first, int64_t last, int depth,
                      const Leaf& leaf) {
  if (last - first == 1) return {leaf(first, depth), layout.count(first)};
  int64_t half = 1;
  while (2 * half < last - first) half *= 2;
  const Merged left = combine_splits(layout, work, channels, first, first + half, depth, leaf);
  const Merged right = combine_splits(layout, work, channels, first + half, last, depth + 1, leaf);
  for (int64_t c = 0; c < channels; ++c) {
    work.merge(&left.partials[c], left.count, right.partials[c], right.count);
  }
  return {left.partials, left.count + right.count};
}

// Depths that combine_splits asks leaves for.
inline int merge_depths(int64_t splits) {
  int depths = 1;
  for (int64_t merged = 1; merged < splits; merged *= 2) ++depths;
  return depths;
}

// Results without statistics: apply(block, chunk) for all of them.
template <typename Apply>
void run_apply(const Layout& layout, int64_t elements, const Apply& apply) {
  const int64_t blocks = layout.blocks();
  over_pieces(threads_for(elements), blocks * layout.splits(),
              [&](int64_t piece) { apply(piece % blocks, piece / blocks); });
}

// Work has: partials(block, chunk, Partial*), merge(Partial* into, double before, const Partial&, double count),
// finish(channel, const Partial&), apply(block, chunk) and a flag, has_apply.
// block_bytes: what a block reads and writes.
//
// Allocates all scratch before writing any result, so that a call that runs out of memory changes nothing.
template <typename Work>
void run(const Layout& layout, const Work& work, int64_t elements, int64_t block_bytes) {
  const int threads = threads_for(elements);
  const int64_t blocks = layout.blocks();
  const int64_t splits = layout.splits();

  const int64_t rounds = (blocks + threads - 1) / threads;
  const bool balanced = 5 * blocks >= 4 * rounds * threads;
  if (threads == 1 || (balanced && block_bytes * threads <= kCacheBytes)) {
    // Scratch of each thread, padded so that neighbours do not share a cache line.
    const int64_t scratch = (merge_depths(splits) * layout.block_channels() + 7) / 8 * 8;
    const std::unique_ptr<Partial[]> by_thread(new Partial[static_cast<size_t>(scratch * threads)]);
    over_pieces(threads, blocks, [&](int64_t block) {
      const int64_t first = layout.first_channel(block);
      const int64_t channels = layout.last_channel(block) - first;
      Partial* by_depth = by_thread.get() + (threads == 1 || blocks == 1 ? 0 : at::get_thread_num() * scratch);
      const Merged all = combine_splits(layout, work, channels, 0, splits, 0, [&](int64_t split, int depth) {
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
  const int64_t width = layout.block_channels();
  const std::unique_ptr<Partial[]> partials(new Partial[static_cast<size_t>(group * splits * width)]);
  for (int64_t base = 0; base < blocks; base += group) {
    const int64_t here = std::min(group, blocks - base);
    over_pieces(threads, here * splits, [&](int64_t piece) {
      work.partials(base + piece / splits, piece % splits, partials.get() + piece * width);
    });
    over_pieces(here * splits * width < 4096 ? 1 : threads, here, [&](int64_t block) {
      Partial* of_block = partials.get() + block * splits * width;
      const int64_t first = layout.first_channel(base + block);
      const int64_t channels = layout.last_channel(base + block) - first;
      const Merged all = combine_splits(layout, work, channels, 0, splits, 0,
                                        [&](int64_t split, int) { return of_block + split * width; });
      for (int64_t c = 0; c < channels; ++c) work.finalize(first + c, all.partials[c]);
    });
    if (!work.has_apply) continue;
    over_pieces_reversed(threads, here * splits,
                         [&](int64_t piece) { work.apply(base + piece / splits, piece % splits); });
  }
}

}  // namespace bnk::cpu
