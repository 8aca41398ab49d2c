// Columns: channels-last, and channels-first with runs that are shorter than a vector.
//
// The problem [outer][channels][inner] is `outer` contiguous rows of channels*inner columns. If a row is shorter than a
// few vectors, kFold rows are processed as one. A column belongs to channel (column / inner) % channels, and the
// statistics of a channel combine those of its columns, in order. In the plain case (inner 1, no fold) a column is a
// channel.
#include <algorithm>
#include <cstring>

#include "simd/scalar.h"
#include "tiling.h"

namespace bnk::cpu {
namespace {

constexpr int64_t kTileRows = 64;    // length of the float addition chains in a tile
constexpr int64_t kSplitRows = 128;  // minimum per split
constexpr int64_t kMaxSplits = 256;
constexpr int64_t kMinMapRows = 16;   // minimum per split without statistics
constexpr int64_t kMinColumns = 128;  // minimum per block; a row of the block still spans several cache lines
constexpr int64_t kPiecesPerThread = 4;
constexpr int64_t kFold = 32;       // makes any number of columns a multiple of the vector size
constexpr int64_t kFoldBelow = 32;  // columns; kFold * kFoldBelow columns fit kMaxColumns

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Columns::Columns(const Problem& problem, int tensors, bool has_partials, int threads)
    : Tiling(problem, tensors), backwards_(has_partials) {
  const int64_t columns = problem.channels * problem.inner;
  fold_ = columns < kFoldBelow && problem.outer >= kFold ? kFold : 1;
  rows_ = problem.outer / fold_;
  rest_columns_ = problem.outer % fold_ * columns;
  row_columns_ = columns * fold_;
  if (has_partials) {
    split_rows_ = ceil_div(rows_, std::clamp<int64_t>(rows_ / kSplitRows, 1, kMaxSplits));
  } else {  // the fewest rows that amortize the per-column vectors
    split_rows_ = std::max(kMapBytes / (row_columns_ * size_of(problem.dtype)), plain() ? kMinMapRows : kSplitRows);
  }
  splits_ = ceil_div(rows_, split_rows_);
  tile_rows_ = ceil_div(split_rows_, ceil_div(split_rows_, kTileRows));
  // Whole rows are the fastest to traverse. Narrow the blocks only if there are too few pieces to occupy the threads.
  int64_t width = kMaxColumns;
  while (has_partials && width > kMinColumns && ceil_div(row_columns_, width) * splits_ < kPiecesPerThread * threads)
    width /= 2;
  block_channels_ = fold_ > 1 ? problem.channels : std::clamp<int64_t>(width / problem.inner, 1, problem.channels);
  block_columns_ = fold_ > 1 ? row_columns_ : block_channels_ * problem.inner;
  blocks_ = ceil_div(problem.channels, block_channels_);
}

double Columns::count(int64_t split) const {
  const int64_t rows = std::min(split_rows_, rows_ - split * split_rows_) * fold_;
  const int64_t rest = split + 1 == splits_ ? problem_.outer % fold_ : 0;
  return static_cast<double>((rows + rest) * problem_.inner);
}

Columns::Piece Columns::body(int64_t block, int64_t split) const {
  const int64_t row = split * split_rows_;
  const int64_t column = block * block_columns_;
  return {row * row_columns_ + column,
          {std::min(split_rows_, rows_ - row), std::min(block_columns_, row_columns_ - column), row_columns_}};
}

Columns::Piece Columns::rest(int64_t, int64_t split) const {  // only a block that is a whole row has one
  return {rows_ * row_columns_, {1, split + 1 == splits_ ? rest_columns_ : 0, row_columns_}};
}

// Expands a per-channel vector to a per-column vector of the block; `space` holds kMaxColumns doubles.
const void* Columns::by_column(const void* vector, int64_t block, void* space) const {
  const int64_t size = size_of(accumulate_dtype(problem_.dtype));
  const char* from = static_cast<const char*>(of_channel(vector, first_channel(block)));
  if (plain()) return from;
  char* to = static_cast<char*>(space);
  const int64_t channels = last_channel(block) - first_channel(block);
  for (int64_t fold = 0; fold < fold_; ++fold) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < problem_.inner; ++i, to += size) {
        std::memcpy(to, from + c * size, static_cast<size_t>(size));
      }
    }
  }
  return space;
}

ReluBoundVectors Columns::by_column(const ReluBoundVectors& relu_bounds, int64_t block, void* low, void* high) const {
  if (relu_bounds.low == nullptr) return relu_bounds;
  return {by_column(relu_bounds.low, block, low), by_column(relu_bounds.high, block, high)};
}

// Calls merge(partial, first, second) over the columns of each channel, in order.
template <typename Merge>
void Columns::by_channel(int64_t block, const double* first, const double* second, Partial* partials,
                         Merge merge) const {
  const int64_t channels = last_channel(block) - first_channel(block);
  for (int64_t fold = 0; fold < fold_; ++fold) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < problem_.inner; ++i) {
        const int64_t column = (fold * channels + c) * problem_.inner + i;
        merge(partials[c], first[column], second[column]);
      }
    }
  }
}

void Columns::welford(const void* x, double floor, int64_t block, int64_t split, Partial* partials) const {
  const Piece part = body(block, split);
  alignas(64) double mean[kMaxColumns];
  alignas(64) double squares[kMaxColumns];
  std::fill_n(mean, part.tile.length, 0.0);
  std::fill_n(squares, part.tile.length, 0.0);
  for (int64_t row = 0; row < part.tile.rows; row += tile_rows_) {
    const Tile tile{std::min(tile_rows_, part.tile.rows - row), part.tile.length, part.tile.stride};
    kernels_.column_welford(at(x, part.offset + row * part.tile.stride), tile, floor * static_cast<double>(tile.rows),
                            row, mean, squares);
  }
  const int64_t channels = last_channel(block) - first_channel(block);
  if (plain()) {
    for (int64_t c = 0; c < channels; ++c) partials[c] = {mean[c], squares[c]};
    return;
  }
  // The columns of a channel have equally many elements: take the mean of the means, then the squares about it.
  const double rows = static_cast<double>(part.tile.rows);
  const double columns = static_cast<double>(fold_ * problem_.inner);
  std::fill_n(partials, channels, Partial{});
  by_channel(block, mean, squares, partials, [](Partial& p, double m, double) { p.first += m; });
  for (int64_t c = 0; c < channels; ++c) partials[c].first /= columns;
  by_channel(block, mean, squares, partials, [rows](Partial& p, double m, double s) {
    const double delta = m - p.first;
    p.second += s + rows * (delta * delta);
  });
  const Piece last = rest(block, split);
  if (last.tile.length == 0) return;
  // The incomplete last row has one element per column.
  kernels_.column_welford(at(x, last.offset), last.tile, 0, 0, mean, squares);
  double before = rows * columns;
  for (int64_t column = 0; column < last.tile.length; column += channels * problem_.inner) {
    for (int64_t i = 0; i < problem_.inner; ++i, before += 1) {
      for (int64_t c = 0; c < channels; ++c) {
        combine_welford(&partials[c], before, {mean[column + c * problem_.inner + i], 0}, 1);
      }
    }
  }
}

void Columns::sums(const void* g, const void* x, const SumVectors& vectors, int64_t block, int64_t split,
                   Partial* partials) const {
  const Piece part = body(block, split);
  const Piece last = rest(block, split);
  alignas(64) double space[4][kMaxColumns];
  const SumVectors columns{by_column(vectors.mean, block, space[0]), by_column(vectors.invstd, block, space[1]),
                           by_column(vectors.relu_bounds, block, space[2], space[3])};
  alignas(64) double sum_g[kMaxColumns];
  alignas(64) double sum_gx[kMaxColumns];
  std::fill_n(sum_g, part.tile.length, 0.0);
  std::fill_n(sum_gx, part.tile.length, 0.0);
  for (int64_t row = 0; row < part.tile.rows; row += tile_rows_) {
    const Tile tile{std::min(tile_rows_, part.tile.rows - row), part.tile.length, part.tile.stride};
    const int64_t offset = part.offset + row * part.tile.stride;
    kernels_.column_sums(at(g, offset), at(x, offset), tile, columns, sum_g, sum_gx);
  }
  if (last.tile.length > 0) {
    kernels_.column_sums(at(g, last.offset), at(x, last.offset), last.tile, columns, sum_g, sum_gx);
  }
  std::fill_n(partials, last_channel(block) - first_channel(block), Partial{});
  by_channel(block, sum_g, sum_gx, partials, [](Partial& p, double first, double second) {
    p.first += first;
    p.second += second;
  });
}

void Columns::normalize(const NormalizeData& data, const AffineVectors& affine, int64_t block, int64_t split) const {
  alignas(64) double space[4][kMaxColumns];
  const AffineVectors columns{by_column(affine.mean, block, space[0]), by_column(affine.invstd, block, space[1]),
                              by_column(affine.weight, block, space[2]), by_column(affine.bias, block, space[3])};
  for (const Piece& part : {rest(block, split), body(block, split)}) {
    if (part.tile.length == 0) continue;
    kernels_.column_normalize(at(data.x, part.offset), at_or_null(data.residual, part.offset), at(data.y, part.offset),
                              part.tile, columns, data.relu, streamed_, backwards_);
  }
  if (streamed_) kernels_.end_of_stream();
}

void Columns::gradient(const void* g, const void* x, void* grad_x, const GradientVectors& vectors, int64_t block,
                       int64_t split) const {
  alignas(64) double space[6][kMaxColumns];
  GradientVectors columns{nullptr, by_column(vectors.scale, block, space[0]), nullptr, nullptr,
                          by_column(vectors.relu_bounds, block, space[4], space[5])};
  if (vectors.slope != nullptr) {
    columns.mean = by_column(vectors.mean, block, space[1]);
    columns.mean_g = by_column(vectors.mean_g, block, space[2]);
    columns.slope = by_column(vectors.slope, block, space[3]);
  }
  for (const Piece& part : {rest(block, split), body(block, split)}) {
    if (part.tile.length == 0) continue;
    kernels_.column_gradient(at(g, part.offset), at(x, part.offset), at(grad_x, part.offset), part.tile, columns,
                             streamed_, backwards_);
  }
  if (streamed_) kernels_.end_of_stream();
}

}  // namespace bnk::cpu
