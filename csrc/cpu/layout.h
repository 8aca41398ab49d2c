// Layout: how a problem is cut, and the arithmetic on one piece of it.
//
// A problem is cut into blocks (of neighbouring channels) x chunks (of each channel's elements). A piece is computed by
// one thread; the statistics of a channel are those of its chunks, merged in pairs. Splits, and the tiles inside of
// them, follow from the problem alone: how many threads there are, and how wide a block is, cannot change a bit.
#pragma once

#include <cstdint>

#include "../core/problem.h"
#include "kernels.h"

namespace bnk::cpu {

// The mean and squares of the union of two sets (Chan, Golub, LeVeque 1983), `before` and `count` elements.
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

// What a call may hope to keep in the last-level cache: data between its two visits, and results for whoever reads them
// next. A cache of 32 MB is usual, and others use it too.
constexpr int64_t kCacheBytes = int64_t{16} << 20;

// Without statistics a piece is this much memory, in a row if it can be.
constexpr int64_t kMapBytes = 65536;

// What y is made of beside the coefficients: relu(normalised x + residual), each part if it is there.
struct NormalizeData {
  const void* x;
  const void* residual;
  void* y;
  bool relu;
};

class Layout {
 public:
  int64_t blocks() const { return blocks_; }
  int64_t splits() const { return splits_; }
  int64_t first_channel(int64_t block) const { return block * block_channels_; }
  int64_t last_channel(int64_t block) const {  // one past it
    const int64_t last = (block + 1) * block_channels_;
    return last < problem_.channels ? last : problem_.channels;
  }
  int64_t block_channels() const { return block_channels_; }
  // Elements of each channel in a chunk.
  virtual double count(int64_t split) const = 0;

  // One piece; partials by channel of the block. `floor`: kernels.h, for each element of a sum.
  virtual void welford(const void* x, double floor, int64_t block, int64_t split, Partial* partials) const = 0;
  virtual void normalize(const NormalizeData& data, const AffineVectors& affine, int64_t block,
                         int64_t split) const = 0;
  virtual void sums(const void* g, const void* x, const SumVectors& vectors, int64_t block, int64_t split,
                    Partial* partials) const = 0;
  virtual void gradient(const void* g, const void* x, void* grad_x, const GradientVectors& vectors, int64_t block,
                        int64_t split) const = 0;

 protected:
  // `tensors`: how many of the problem's size should be in the cache together.
  Layout(const Problem& problem, int tensors)
      : problem_(problem),
        kernels_(kernels(problem.dtype)),
        streamed_(problem.elements() * size_of(problem.dtype) * tensors > kCacheBytes) {}
  ~Layout() = default;

  const void* at(const void* data, int64_t element) const {
    return static_cast<const char*>(data) + element * size_of(problem_.dtype);
  }
  const void* at_or_null(const void* data, int64_t element) const {
    return data == nullptr ? nullptr : at(data, element);
  }
  void* at(void* data, int64_t element) const { return static_cast<char*>(data) + element * size_of(problem_.dtype); }
  // A vector by channel, from `channel` on.
  const void* of_channel(const void* vector, int64_t channel) const {
    return static_cast<const char*>(vector) + channel * size_of(accumulate_dtype(problem_.dtype));
  }
  ReluBoundVectors of_channel(const ReluBoundVectors& relu_bounds, int64_t channel) const {
    if (relu_bounds.low == nullptr) return relu_bounds;
    return {of_channel(relu_bounds.low, channel), of_channel(relu_bounds.high, channel)};
  }

  Problem problem_;
  const Kernels& kernels_;
  bool streamed_;  // results are written past the cache
  int64_t blocks_ = 0;
  int64_t splits_ = 0;
  int64_t block_channels_ = 0;
};

// Channels-first: runs of `inner` elements (rows.cpp). Any problem, best where inner is not tiny.
class Rows final : public Layout {
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
  // What a statistics kernel takes of a chunk in one call: a tile, of all channels of the block or of one.
  struct Piece {
    int64_t offset;  // of its first element
    Tile tile;
    int64_t before;  // elements of a channel before the tile
    int channel;     // of the block, the first
    int channels;
  };
  Piece piece(int64_t block, int64_t split, int64_t index) const;
  int64_t pieces(int64_t block, int64_t split) const;
  int64_t to_next(int64_t block, int64_t split, int64_t index) const;
  // Calls write(offset, tile) over a chunk, all channels of the block at once, from its end.
  template <typename F>
  void over_rows_reversed(int64_t block, int64_t split, const F& write) const;
  int64_t offset(int64_t block, int64_t tile) const;
  Tile tile_at(int64_t tile) const;
  // Whether a row of the block is several channels of several tiles each.
  bool crossed(int64_t block) const { return segments_ > 1 && channels(block) > 1; }
  int channels(int64_t block) const { return static_cast<int>(last_channel(block) - first_channel(block)); }
  int64_t elements_before(int64_t tile) const;
  int64_t first_tile(int64_t split) const { return split * split_tiles_; }
  int64_t last_tile(int64_t split) const {
    const int64_t last = (split + 1) * split_tiles_;
    return last < tiles_ ? last : tiles_;
  }

  int64_t tiles_;        // of a channel
  int64_t split_tiles_;  // tiles of a chunk
  int64_t segments_;     // tiles of a run; 1 where a tile holds whole runs
  int64_t length_;       // elements of a segment
  int64_t tile_rows_;    // runs of a tile
};

// Channels-last, and channels-first with tiny runs: columns (columns.cpp).
class Columns final : public Layout {
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
  // The whole rows of a piece, and what remains of an incomplete row (no columns: none).
  Piece body(int64_t block, int64_t split) const;
  Piece rest(int64_t block, int64_t split) const;
  bool plain() const { return fold_ == 1 && problem_.inner == 1; }  // a column is a channel
  const void* by_column(const void* vector, int64_t block, void* space) const;
  ReluBoundVectors by_column(const ReluBoundVectors& relu_bounds, int64_t block, void* low, void* high) const;
  template <typename Merge>
  void by_channel(int64_t block, const double* first, const double* second, Partial* partials, Merge merge) const;

  // After statistics chunks come in reverse (schedule.h), and memory is walked in one direction through all of them.
  bool backwards_;
  int64_t fold_;          // rows of the problem in a row of columns
  int64_t rows_;          // whole rows
  int64_t rest_columns_;  // of the incomplete row after them
  int64_t row_columns_;
  int64_t split_rows_;
  int64_t tile_rows_;
  int64_t block_columns_;
};

}  // namespace bnk::cpu
