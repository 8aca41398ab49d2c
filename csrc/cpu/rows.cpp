// Rows: channels-first. A channel is `outer` runs of `inner` contiguous elements.
//
// Tiles of about kTileBytes: a piece of a long run, or several short runs. A block holds several channels where runs
// are short, so that a thread walks neighbouring runs together and every cache line that it fetches is used.
//
// Where there are no statistics nothing is visited twice, and memory is best walked from end to end: a block then holds
// as many channels as make a long stretch, a chunk is one row of them, and a tile is a chunk.
#include <algorithm>

#include "layout.h"

namespace bnk::cpu {
namespace {

constexpr int64_t kTileBytes = 8192;  // in the arithmetic type: short chains, and its second pass is from the cache
constexpr int64_t kChunkTiles = 32;   // at least, in a chunk
constexpr int64_t kMaxChunks = 256;
constexpr int64_t kStreamedRunBytes = 4096;
constexpr int64_t kBlockRunBytes = 2048;  // neighbouring runs that a block walks together
constexpr int64_t kStretchBytes = 65536;  // of memory in a row, where there are no statistics and so no tiles

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Rows::Rows(const Problem& problem, int tensors, bool has_partials) : Layout(problem, tensors) {
  const int64_t inner = problem.inner;
  const int64_t run_bytes = inner * size_of(problem.dtype);
  // Past the cache only whole lines: the ends of short runs would be written to the same lines both ways.
  streamed_ = streamed_ && run_bytes >= kStreamedRunBytes;
  if (!has_partials) {
    length_ = std::min(inner, kStretchBytes / size_of(problem.dtype));
    segments_ = ceil_div(inner, length_);
    tile_rows_ = chunk_tiles_ = 1;
    tiles_ = chunks_ = problem.outer * segments_;
    block_channels_ = std::clamp<int64_t>(kStretchBytes / run_bytes, 1, problem.channels);
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
    tile_rows_ = tile_elements / inner;
    tiles_ = ceil_div(problem.outer, tile_rows_);
  }
  chunk_tiles_ = std::max(kChunkTiles, ceil_div(tiles_, kMaxChunks));
  chunks_ = ceil_div(tiles_, chunk_tiles_);
  block_channels_ = std::clamp<int64_t>(ceil_div(kBlockRunBytes, run_bytes), 1, kMaxRowChannels);
  block_channels_ = std::min(block_channels_, problem.channels);
  blocks_ = ceil_div(problem.channels, block_channels_);
}

Rows::Piece Rows::piece(int64_t block, int64_t tile) const {
  const int64_t column = first_channel(block) * problem_.inner;
  const int64_t row_elements = problem_.channels * problem_.inner;
  if (segments_ > 1) {
    const int64_t row = tile / segments_;
    const int64_t begin = tile % segments_ * length_;
    return {row * row_elements + column + begin, {1, std::min(length_, problem_.inner - begin), row_elements}};
  }
  const int64_t row = tile * tile_rows_;
  return {row * row_elements + column, {std::min(tile_rows_, problem_.outer - row), problem_.inner, row_elements}};
}

int64_t Rows::elements_before(int64_t tile) const {
  if (segments_ > 1) return tile / segments_ * problem_.inner + tile % segments_ * length_;
  return std::min(tile * tile_rows_, problem_.outer) * problem_.inner;
}

double Rows::count(int64_t chunk) const {
  return static_cast<double>(elements_before(last_tile(chunk)) - elements_before(first_tile(chunk)));
}

void Rows::moments(const void* x, double floor, int64_t block, int64_t chunk, Partial* partials) const {
  const int64_t first = first_channel(block);
  const int channels = static_cast<int>(last_channel(block) - first);
  double before = 0;
  for (int64_t tile = first_tile(chunk); tile < last_tile(chunk); ++tile) {
    const Piece part = piece(block, tile);
    const double count = static_cast<double>(part.tile.rows * part.tile.length);
    Partial of_tile[kMaxRowChannels];
    kernels_.row_moments(at(x, part.offset), part.tile, channels, floor * count, of_tile);
    for (int c = 0; c < channels; ++c) merge_moments(&partials[c], before, of_tile[c], count);
    before += count;
  }
}

void Rows::sums(const void* g, const void* x, const void* mean, const void* invstd, int64_t block, int64_t chunk,
                Partial* partials) const {
  const int64_t first = first_channel(block);
  const int channels = static_cast<int>(last_channel(block) - first);
  std::fill_n(partials, channels, Partial{});
  for (int64_t tile = first_tile(chunk); tile < last_tile(chunk); ++tile) {
    const Piece part = piece(block, tile);
    Partial of_tile[kMaxRowChannels];
    kernels_.row_sums(at(g, part.offset), at(x, part.offset), part.tile, channels, of_channel(mean, first),
                      of_channel(invstd, first), of_tile);
    for (int c = 0; c < channels; ++c) {
      partials[c].first += of_tile[c].first;
      partials[c].second += of_tile[c].second;
    }
  }
}

void Rows::normalize(const void* x, void* y, const AffineVectors& affine, int64_t block, int64_t chunk) const {
  const int64_t first = first_channel(block);
  const int channels = static_cast<int>(last_channel(block) - first);
  const AffineVectors of_block{of_channel(affine.mean, first), of_channel(affine.scale, first),
                               of_channel(affine.bias, first)};
  for (int64_t tile = last_tile(chunk) - 1; tile >= first_tile(chunk); --tile) {
    const Piece part = piece(block, tile);
    kernels_.row_normalize(at(x, part.offset), at(y, part.offset), part.tile, channels, of_block, streamed_);
  }
  if (streamed_) kernels_.end_of_stream();
}

void Rows::gradient(const void* g, const void* x, void* grad_x, const GradientVectors& vectors, int64_t block,
                    int64_t chunk) const {
  const int64_t first = first_channel(block);
  const int channels = static_cast<int>(last_channel(block) - first);
  const GradientVectors of_block{of_channel(vectors.mean, first), of_channel(vectors.scale, first),
                                 of_channel(vectors.mean_g, first), of_channel(vectors.slope, first)};
  for (int64_t tile = last_tile(chunk) - 1; tile >= first_tile(chunk); --tile) {
    const Piece part = piece(block, tile);
    kernels_.row_gradient(at(g, part.offset), x == nullptr ? nullptr : at(x, part.offset), at(grad_x, part.offset),
                          part.tile, channels, of_block, streamed_);
  }
  if (streamed_) kernels_.end_of_stream();
}

}  // namespace bnk::cpu
