// Tiling: the partition of a problem into pieces, and the arithmetic on one piece.
//
// A problem is partitioned into blocks (of neighbouring channels) x splits (of each channel's elements). One thread
// computes a piece, which is one split of one block. The statistics of a channel's splits are combined pairwise.
// Splits, and the tiles inside them, depend only on the problem, so the number of threads and the width of a block
// never change a bit of the result.
#pragma once

#include <cstdint>

#include "../core/problem.h"
#include "kernels.h"

namespace bnk::cpu {

// Combines the means and sums of squares of two sets of `before` and `count` elements (Chan, Golub, LeVeque 1983).
inline void combine_welford(Partial* into, double before, const Partial& from, double count) {
  if (before == 0) {
    *into = from;
    return;
  }
  const double delta = from.first - into->first;
  const double share = count / (before + count);
  into->first += delta * share;
  into->second += from.second + delta * delta * before * share;
}

// The share of the last-level cache that one call may use, for data between its two visits and for results until their
// consumer reads them. 32 MB is a common cache size, and other processes use it too.
constexpr int64_t kCacheBytes = int64_t{16} << 20;

// Size of a piece that computes no statistics; contiguous where possible.
constexpr int64_t kMapBytes = 65536;

// The tensors of y = relu(normalized x + residual); `residual` may be null, `relu` may be false.
struct NormalizeData {
  const void* x;
  const void* residual;
  void* y;
  bool relu;
};

class Tiling {
 public:
  int64_t blocks() const { return blocks_; }
  int64_t splits() const { return splits_; }
  int64_t first_channel(int64_t block) const { return block * block_channels_; }
  int64_t last_channel(int64_t block) const {  // exclusive
    const int64_t last = (block + 1) * block_channels_;
    return last < problem_.channels ? last : problem_.channels;
  }
  int64_t block_channels() const { return block_channels_; }
  // Elements per channel in a split.
  virtual double count(int64_t split) const = 0;

  // One piece; `partials` has one entry per channel of the block. `floor`: per element of a sum, see kernels.h.
  virtual void welford(const void* x, double floor, int64_t block, int64_t split, Partial* partials) const = 0;
  virtual void normalize(const NormalizeData& data, const AffineVectors& affine, int64_t block,
                         int64_t split) const = 0;
  virtual void sums(const void* g, const void* x, const SumVectors& vectors, int64_t block, int64_t split,
                    Partial* partials) const = 0;
  virtual void gradient(const void* g, const void* x, void* grad_x, const GradientVectors& vectors, int64_t block,
                        int64_t split) const = 0;

 protected:
  // `tensors`: how many tensors of the problem's size should be in the cache at the same time.
  Tiling(const Problem& problem, int tensors)
      : problem_(problem),
        kernels_(kernels(problem.dtype)),
        streamed_(problem.elements() * size_of(problem.dtype) * tensors > kCacheBytes) {}
  ~Tiling() = default;

  const void* at(const void* data, int64_t element) const {
    return static_cast<const char*>(data) + element * size_of(problem_.dtype);
  }
  const void* at_or_null(const void* data, int64_t element) const {
    return data == nullptr ? nullptr : at(data, element);
  }
  void* at(void* data, int64_t element) const { return static_cast<char*>(data) + element * size_of(problem_.dtype); }
  // A per-channel vector, starting at `channel`.
  const void* of_channel(const void* vector, int64_t channel) const {
    return static_cast<const char*>(vector) + channel * size_of(accumulate_dtype(problem_.dtype));
  }
  ReluBoundVectors of_channel(const ReluBoundVectors& relu_bounds, int64_t channel) const {
    if (relu_bounds.low == nullptr) return relu_bounds;
    return {of_channel(relu_bounds.low, channel), of_channel(relu_bounds.high, channel)};
  }

  Problem problem_;
  const Kernels& kernels_;
  bool streamed_;  // write results with non-temporal stores
  int64_t blocks_ = 0;
  int64_t splits_ = 0;
  int64_t block_channels_ = 0;
};

// Channels-first: runs of `inner` elements (rows.cpp). Handles any problem; efficient unless inner is tiny.
class Rows final : public Tiling {
 public:
  Rows(const Problem& problem, int tensors, bool has_partials);
  double count(int64_t split) const override;
  void welford(const void* x, double floor, int64_t block, int64_t split, Partial* partials) const override;
  void normalize(const NormalizeData& data, const AffineVectors& affine, int64_t block, int64_t split) const override;
  void sums(const void* g, const void* x, const SumVectors& vectors, int64_t block, int64_t split,
            Partial* partials) const override;
  void gradient(const void* g, const void* x, void* grad_x, const GradientVectors& vectors, int64_t block,
                int64_t split) const override;

 private:
  // The part of a split that one call of a statistics kernel processes: a tile of all channels of the block, or of one.
  struct Piece {
    int64_t offset;  // of its first element
    Tile tile;
    int64_t before;  // elements of a channel before the tile, within the split
    int channel;     // the first channel, relative to the block
    int channels;
  };
  Piece piece(int64_t block, int64_t split, int64_t index) const;
  int64_t pieces(int64_t block, int64_t split) const;
  int64_t to_next(int64_t block, int64_t split, int64_t index) const;
  // Calls write(offset, tile) over a split, all channels of the block together, in reverse order.
  template <typename F>
  void over_rows_reversed(int64_t block, int64_t split, const F& write) const;
  int64_t offset(int64_t block, int64_t tile) const;
  Tile tile_at(int64_t tile) const;
  // Whether a row of the block holds several channels of several tiles each.
  bool crossed(int64_t block) const { return segments_ > 1 && channels(block) > 1; }
  int channels(int64_t block) const { return static_cast<int>(last_channel(block) - first_channel(block)); }
  int64_t elements_before(int64_t tile) const;
  int64_t first_tile(int64_t split) const { return split * split_tiles_; }
  int64_t last_tile(int64_t split) const {
    const int64_t last = (split + 1) * split_tiles_;
    return last < tiles_ ? last : tiles_;
  }

  int64_t tiles_;        // of a channel
  int64_t split_tiles_;  // tiles per split
  int64_t segments_;     // tiles per run; 1 if a tile holds whole runs
  int64_t length_;       // elements per segment
  int64_t tile_rows_;    // runs per tile
};

// Channels-last, and channels-first with tiny runs: columns (columns.cpp).
class Columns final : public Tiling {
 public:
  Columns(const Problem& problem, int tensors, bool has_partials, int threads);
  double count(int64_t split) const override;
  void welford(const void* x, double floor, int64_t block, int64_t split, Partial* partials) const override;
  void normalize(const NormalizeData& data, const AffineVectors& affine, int64_t block, int64_t split) const override;
  void sums(const void* g, const void* x, const SumVectors& vectors, int64_t block, int64_t split,
            Partial* partials) const override;
  void gradient(const void* g, const void* x, void* grad_x, const GradientVectors& vectors, int64_t block,
                int64_t split) const override;

 private:
  struct Piece {
    int64_t offset;
    Tile tile;
  };
  // The whole rows of a piece, and its part of the incomplete last row (length 0 if none).
  Piece body(int64_t block, int64_t split) const;
  Piece rest(int64_t block, int64_t split) const;
  bool plain() const { return fold_ == 1 && problem_.inner == 1; }  // a column is a channel
  const void* by_column(const void* vector, int64_t block, void* space) const;
  ReluBoundVectors by_column(const ReluBoundVectors& relu_bounds, int64_t block, void* low, void* high) const;
  template <typename Merge>
  void by_channel(int64_t block, const double* first, const double* second, Partial* partials, Merge merge) const;

  // After the statistics, splits are visited in reverse order (schedule.h), and memory backwards throughout.
  bool backwards_;
  int64_t fold_;          // rows of the problem in one row of columns
  int64_t rows_;          // whole rows
  int64_t rest_columns_;  // in the incomplete row after them
  int64_t row_columns_;
  int64_t split_rows_;
  int64_t tile_rows_;
  int64_t block_columns_;
};

}  // namespace bnk::cpu
