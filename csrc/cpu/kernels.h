// Kernels: the interface between the layouts (rows.cpp, columns.cpp) and the SIMD levels (simd/). Each SIMD level
// provides one function table per dtype; the layouts call through it and contain no SIMD code.
//
// There are two kinds of kernels, one per layout. Both traverse memory row by row:
//
//   row kernels      channels-first: a row holds `length` contiguous elements of each of `channels` channels
//   column kernels   channels-last:  a row holds one element of each of `length` channels; a column is a channel
//
// Statistics are computed per tile. A tile is small enough for the caches and for short chains of float additions: the
// first pass computes the mean, the second the centred squares of the same tile. Both are returned as double. A tile
// whose float arithmetic overflows, or whose sum of squares is below `floor`, where float's underflow would matter, is
// recomputed in double.
//
// Pointers need only element alignment. No kernel allocates or throws.
#pragma once

#include <cstdint>

#include "../core/problem.h"

namespace bnk::cpu {

constexpr int kMaxRowChannels = 8;
constexpr int kMaxColumns = 1024;

struct Tile {
  int64_t rows;
  int64_t length;
  int64_t stride;  // elements between the starts of consecutive rows
};

// Two sums over some of a channel's elements.
//   forward:  first = mean, second = sum of squared deviations from it
//   backward: first = sum(g), second = sum(g*xhat)
struct Partial {
  double first;
  double second;
};

// Per-channel coefficients in the arithmetic type: y = (x - mean)*invstd*weight + bias. Nothing is folded:
// invstd*weight can overflow float where no y does, and mean*invstd cancels where the mean is large.
struct AffineVectors {
  const void *mean, *invstd, *weight, *bias;
};

// ReLU bounds: g is replaced by 0 in every formula unless low <= x <= high. Null if there is no ReLU.
struct ReluBoundVectors {
  const void *low, *high;
};

// The inputs of sum(g) and sum(g*(x - mean)*invstd).
struct SumVectors {
  const void *mean, *invstd;
  ReluBoundVectors relu_bounds;
};

// grad_x = scale*(g - mean_g - (x - mean)*slope), with scale = invstd*weight and slope = invstd*mean(g*xhat). Both
// products are computed in double and rounded once. Inference: slope == nullptr, grad_x = scale*g, and x is read only
// for the ReLU bounds.
struct GradientVectors {
  const void *mean, *scale, *mean_g, *slope;
  ReluBoundVectors relu_bounds;
};

struct Kernels {
  // Per-channel vectors start at the first of the `channels` channels; kernels that compute sums take at most
  // kMaxRowChannels. `ahead`: offset in elements from this tile to the tile read next, which the kernel prefetches.
  void (*row_welford)(const void* x, Tile tile, int64_t ahead, int channels, double floor, Partial* of_tile);
  // y = relu(v + residual), where v is the value that AffineVectors defines; `residual` may be null, `relu` may be
  // false.
  void (*row_normalize)(const void* x, const void* residual, void* y, Tile tile, int channels,
                        const AffineVectors& affine, bool relu, bool streamed);
  void (*row_sums)(const void* g, const void* x, Tile tile, int64_t ahead, int channels, const SumVectors& vectors,
                   Partial* of_tile);
  void (*row_gradient)(const void* g, const void* x, void* grad_x, Tile tile, int channels,
                       const GradientVectors& gradient, bool streamed);

  // At most kMaxColumns columns. Per-column vectors start at the tile's first column.
  // Combines the tile's Welford data into that of the `before` rows before it.
  void (*column_welford)(const void* x, Tile tile, double floor, int64_t before, double* mean, double* squares);
  // `backwards`: writes results from the tile's end to its beginning.
  void (*column_normalize)(const void* x, const void* residual, void* y, Tile tile, const AffineVectors& affine,
                           bool relu, bool streamed, bool backwards);
  // Adds the tile's sums to sum_g and sum_gx.
  void (*column_sums)(const void* g, const void* x, Tile tile, const SumVectors& vectors, double* sum_g,
                      double* sum_gx);
  void (*column_gradient)(const void* g, const void* x, void* grad_x, Tile tile, const GradientVectors& gradient,
                          bool streamed, bool backwards);

  // Must follow streamed (non-temporal) writes before another thread reads the results.
  void (*end_of_stream)();
};

// Each is defined in its level_*.cpp.
namespace baseline {
const Kernels& kernels(Dtype dtype);
}
namespace avx2 {
const Kernels& kernels(Dtype dtype);
}
namespace avx512 {
const Kernels& kernels(Dtype dtype);
}
namespace avx512_bf16 {
const Kernels& kernels(Dtype dtype);
}

// The table of the SIMD level chosen at run time (simd_level.cpp).
const Kernels& kernels(Dtype dtype);

}  // namespace bnk::cpu
