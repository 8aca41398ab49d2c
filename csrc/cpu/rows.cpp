// Rows: channels-first. A channel is `outer` runs of `inner` contiguous elements.
//
// A tile is about kTileBytes: a segment of a long run, or several short runs. A block holds a few channels, and a
// thread traverses their neighbouring runs together: the contiguous stretches of memory are longer, and every cache
// line that is fetched is used in full.
//
// Without statistics nothing is visited twice, and memory is best traversed from end to end: a block then holds as many
// channels as make a long contiguous stretch, a split is one row of them, and a tile is a split.
#include <algorithm>

#include "tiling.h"

namespace bnk::cpu {
namespace {

// in the arithmetic type: short addition chains, and the second pass hits the cache
constexpr int64_t kTileBytes = 8192;
constexpr int64_t kSplitTiles = 32;  // minimum per split
constexpr int64_t kMaxSplits = 256;
constexpr int64_t kStreamedRunBytes = 4096;
constexpr int64_t kBlockChannels = 4;       // channels per block, unless
constexpr int64_t kMinStretchBytes = 1024;  // a row of the block is shorter: then more, up to kMaxRowChannels
constexpr int64_t kBlockBytes = 524288;     // the block is larger, too much for a second-level cache: then fewer

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Rows::Rows(const Problem& problem, int tensors, bool has_partials) : Tiling(problem, tensors) {
  const int64_t inner = problem.inner;
  const int64_t run_bytes = inner * size_of(problem.dtype);
  // Only whole cache lines may be streamed: the ends of short runs would mix cached and streamed writes to one line.
  streamed_ = streamed_ && run_bytes >= kStreamedRunBytes;
  if (!has_partials) {
    length_ = std::min(inner, kMapBytes / size_of(problem.dtype));
    segments_ = ceil_div(inner, length_);
    tile_rows_ = split_tiles_ = 1;
    tiles_ = splits_ = problem.outer * segments_;
    block_channels_ = std::clamp<int64_t>(kMapBytes / run_bytes, 1, problem.channels);
    blocks_ = ceil_div(problem.channels, block_channels_);
    return;
  }
  const int64_t tile_elements = kTileBytes / size_of(accumulate_dtype(problem.dtype));
  if (inner >= tile_elements) {
    length_ = ceil_div(ceil_div(inner, ceil_div(inner, tile_elements)), 64) * 64;
    segments_ = ceil_div(inner, length_);
    tile_rows_ = 1;
    tiles_ = problem.outer * segments_;
  } else {
    length_ = inner;
    segments_ = 1;
    tiles_ = ceil_div(problem.outer, tile_elements / inner);
    // of equal size, since each tile prefetches the next in its own shape
    tile_rows_ = ceil_div(problem.outer, tiles_);
    tiles_ = ceil_div(problem.outer, tile_rows_);
  }
  split_tiles_ = std::max(kSplitTiles, ceil_div(tiles_, kMaxSplits));
  const bool whole_runs = segments_ <= split_tiles_;  // per split; a longer run is a block of its own
  if (whole_runs) split_tiles_ = ceil_div(split_tiles_, segments_) * segments_;
  splits_ = ceil_div(tiles_, split_tiles_);
  // Powers of two, so that more blocks begin at a cache line.
  block_channels_ = whole_runs ? kBlockChannels : 1;
  while (block_channels_ < kMaxRowChannels && block_channels_ * run_bytes < kMinStretchBytes) block_channels_ *= 2;
  while (block_channels_ > 1 && block_channels_ * run_bytes * problem.outer > kBlockBytes) block_channels_ /= 2;
  block_channels_ = std::min(block_channels_, problem.channels);
  blocks_ = ceil_div(problem.channels, block_channels_);
}

int64_t Rows::offset(int64_t block, int64_t tile) const {
  const int64_t row = segments_ > 1 ? tile / segments_ : tile * tile_rows_;
  return (row * problem_.channels + first_channel(block)) * problem_.inner + tile % segments_ * length_;
}

Tile Rows::tile_at(int64_t tile) const {
  const int64_t stride = problem_.channels * problem_.inner;
  if (segments_ > 1) return {1, std::min(length_, problem_.inner - tile % segments_ * length_), stride};
  return {std::min(tile_rows_, problem_.outer - tile * tile_rows_), problem_.inner, stride};
}

int64_t Rows::pieces(int64_t block, int64_t split) const {
  return (last_tile(split) - first_tile(split)) * (crossed(block) ? channels(block) : 1);
}

Rows::Piece Rows::piece(int64_t block, int64_t split, int64_t index) const {
  const int64_t before = elements_before(first_tile(split));
  if (!crossed(block)) {
    const int64_t tile = first_tile(split) + index;
    return {offset(block, tile), tile_at(tile), elements_before(tile) - before, 0, channels(block)};
  }
  // Row by row, channel by channel, tile by tile: a split consists of whole runs here.
  const int64_t row = index / (channels(block) * segments_);
  const int64_t channel = index / segments_ % channels(block);
  const int64_t tile = first_tile(split) + row * segments_ + index % segments_;
  return {offset(block, tile) + channel * problem_.inner, tile_at(tile), elements_before(tile) - before,
          static_cast<int>(channel), 1};
}

// Offset in elements from a piece to the piece that the same thread most likely reads next.
int64_t Rows::to_next(int64_t block, int64_t split, int64_t index) const {
  const int64_t here = piece(block, split, index).offset;
  if (index + 1 < pieces(block, split)) return piece(block, split, index + 1).offset - here;
  return (split + 1 < splits_ ? offset(block, first_tile(split + 1)) : offset(block + 1, 0)) - here;
}

template <typename F>
void Rows::over_rows_reversed(int64_t block, int64_t split, const F& write) const {
  if (!crossed(block)) {
    for (int64_t tile = last_tile(split) - 1; tile >= first_tile(split); --tile) {
      write(offset(block, tile), tile_at(tile));
    }
    return;
  }
  const Tile row{1, problem_.inner, problem_.channels * problem_.inner};
  for (int64_t tile = last_tile(split) - segments_; tile >= first_tile(split); tile -= segments_) {
    write(offset(block, tile), row);
  }
}

int64_t Rows::elements_before(int64_t tile) const {
  if (segments_ > 1) return tile / segments_ * problem_.inner + tile % segments_ * length_;
  return std::min(tile * tile_rows_, problem_.outer) * problem_.inner;
}

double Rows::count(int64_t split) const {
  return static_cast<double>(elements_before(last_tile(split)) - elements_before(first_tile(split)));
}

void Rows::welford(const void* x, double floor, int64_t block, int64_t split, Partial* partials) const {
  const int64_t last = pieces(block, split);
  for (int64_t index = 0; index < last; ++index) {
    const Piece part = piece(block, split, index);
    const double count = static_cast<double>(part.tile.rows * part.tile.length);
    Partial of_tile[kMaxRowChannels];
    kernels_.row_welford(at(x, part.offset), part.tile, to_next(block, split, index), part.channels, floor * count,
                         of_tile);
    for (int c = 0; c < part.channels; ++c) {
      combine_welford(&partials[part.channel + c], static_cast<double>(part.before), of_tile[c], count);
    }
  }
}

void Rows::sums(const void* g, const void* x, const SumVectors& vectors, int64_t block, int64_t split,
                Partial* partials) const {
  std::fill_n(partials, channels(block), Partial{});
  const int64_t last = pieces(block, split);
  for (int64_t index = 0; index < last; ++index) {
    const Piece part = piece(block, split, index);
    const int64_t first = first_channel(block) + part.channel;
    const SumVectors of_piece{of_channel(vectors.mean, first), of_channel(vectors.invstd, first),
                              of_channel(vectors.relu_bounds, first)};
    Partial of_tile[kMaxRowChannels];
    kernels_.row_sums(at(g, part.offset), at(x, part.offset), part.tile, to_next(block, split, index), part.channels,
                      of_piece, of_tile);
    for (int c = 0; c < part.channels; ++c) {
      partials[part.channel + c].first += of_tile[c].first;
      partials[part.channel + c].second += of_tile[c].second;
    }
  }
}

void Rows::normalize(const NormalizeData& data, const AffineVectors& affine, int64_t block, int64_t split) const {
  const int64_t first = first_channel(block);
  const AffineVectors of_block{of_channel(affine.mean, first), of_channel(affine.invstd, first),
                               of_channel(affine.weight, first), of_channel(affine.bias, first)};
  over_rows_reversed(block, split, [&](int64_t offset, const Tile& tile) {
    kernels_.row_normalize(at(data.x, offset), at_or_null(data.residual, offset), at(data.y, offset), tile,
                           channels(block), of_block, data.relu, streamed_);
  });
  if (streamed_) kernels_.end_of_stream();
}

void Rows::gradient(const void* g, const void* x, void* grad_x, const GradientVectors& vectors, int64_t block,
                    int64_t split) const {
  const int64_t first = first_channel(block);
  GradientVectors of_block{nullptr, of_channel(vectors.scale, first), nullptr, nullptr,
                           of_channel(vectors.relu_bounds, first)};
  if (vectors.slope != nullptr) {
    of_block.mean = of_channel(vectors.mean, first);
    of_block.mean_g = of_channel(vectors.mean_g, first);
    of_block.slope = of_channel(vectors.slope, first);
  }
  over_rows_reversed(block, split, [&](int64_t offset, const Tile& tile) {
    kernels_.row_gradient(at(g, offset), at(x, offset), at(grad_x, offset), tile, channels(block), of_block, streamed_);
  });
  if (streamed_) kernels_.end_of_stream();
}

}  // namespace bnk::cpu
