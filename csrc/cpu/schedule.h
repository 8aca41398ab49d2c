// Schedule: which thread computes which piece of a layout, and when.
//
// Three steps: the statistics of every chunk; a channel's chunks merged in order and its coefficients set; the result,
// chunks in reverse, so that what was read last is still in the cache. Two ways, with the same bits:
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

// Work has: partials(block, chunk, Partial*), merge(Partial* into, double before, const Partial&, double count),
// finish(channel, const Partial&), apply(block, chunk) and two flags, has_partials and has_apply.
// block_bytes: what a block reads and writes.
template <typename Work>
void run(const Layout& layout, const Work& work, int64_t elements, int64_t block_bytes) {
  const int threads = threads_for(elements);
  const int64_t blocks = layout.blocks();
  const int64_t chunks = layout.chunks();

  if (!work.has_partials) {
    over_pieces(threads, blocks * chunks, [&](int64_t piece) { work.apply(piece % blocks, piece / blocks); });
    return;
  }

  const int64_t rounds = (blocks + threads - 1) / threads;
  const bool balanced = 5 * blocks >= 4 * rounds * threads;
  if (threads == 1 || (balanced && block_bytes * threads <= kCacheBytes)) {
    over_pieces(threads, blocks, [&](int64_t block) {
      Partial total[Layout::kMaxBlockChannels];
      Partial next[Layout::kMaxBlockChannels];
      const int64_t first = layout.first_channel(block);
      const int64_t channels = layout.last_channel(block) - first;
      work.partials(block, 0, total);
      double before = layout.count(0);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        const double count = layout.count(chunk);
        work.partials(block, chunk, next);
        for (int64_t c = 0; c < channels; ++c) work.merge(&total[c], before, next[c], count);
        before += count;
      }
      for (int64_t c = 0; c < channels; ++c) work.finish(first + c, total[c]);
      if (!work.has_apply) return;
      for (int64_t chunk = chunks; chunk-- > 0;) work.apply(block, chunk);
    });
    return;
  }

  const int64_t group = std::clamp<int64_t>(kCacheBytes / block_bytes, 1, blocks);
  const int64_t width = layout.block_channels();
  const std::unique_ptr<Partial[]> partials(new Partial[static_cast<size_t>(group * chunks * width)]);
  for (int64_t base = 0; base < blocks; base += group) {
    const int64_t here = std::min(group, blocks - base);
    over_pieces(threads, here * chunks, [&](int64_t piece) {
      work.partials(base + piece / chunks, piece % chunks, partials.get() + piece * width);
    });
    over_pieces(here * chunks * width < 4096 ? 1 : threads, here, [&](int64_t block) {
      Partial* of_block = partials.get() + block * chunks * width;
      const int64_t first = layout.first_channel(base + block);
      const int64_t channels = layout.last_channel(base + block) - first;
      double before = layout.count(0);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        const double count = layout.count(chunk);
        for (int64_t c = 0; c < channels; ++c) {
          work.merge(&of_block[c], before, of_block[chunk * width + c], count);
        }
        before += count;
      }
      for (int64_t c = 0; c < channels; ++c) work.finish(first + c, of_block[c]);
    });
    if (!work.has_apply) continue;
    over_pieces_reversed(threads, here * chunks,
                         [&](int64_t piece) { work.apply(base + piece / chunks, piece % chunks); });
  }
}

}  // namespace bnk::cpu
