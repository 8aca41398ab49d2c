// Kernels: what a SIMD level computes. One table for each level and dtype; the layouts (rows.cpp, columns.cpp) call
// through it and know nothing of instructions.
//
// Two shapes of work, after the two layouts; both walk memory row by row:
//
//   row kernels      channels-first: a row holds, one after another, `length` elements of each of `channels` channels
//   column kernels   channels-last:  a row holds one element of each of `length` channels, a column to a channel
//
// Statistics come in tiles small enough for the caches and for short float chains: the mean first, then the centred
// squares of the same tile, leaving as double. A tile whose float arithmetic overflows (or whose sum of squares falls
// below `floor`, where float's underflow would count) is done again in double.
// Pointers may be aligned to their element only. No kernel allocates or throws.
#pragma once

#include <cstdint>

#include "../core/problem.h"

namespace bnk::cpu {

constexpr int kMaxRowChannels = 8;
constexpr int kMaxColumns = 1024;

struct Tile {
  int64_t rows;
  int64_t length;
  int64_t stride;  // elements from a row to the next
};

// Two sums of one channel over some of its elements.
//   forward: first = mean, second = sum of squares about it.    backward: first = sum(g), second = sum(g*xhat).
struct Partial {
  double first;
  double second;
};

// Coefficients by channel, in the arithmetic type. y = (x - mean)*invstd*weight + bias. The product invstd*weight may be
// beyond float where every y is not, and mean*invstd cancels where the mean is large: neither is folded.
struct AffineVectors {
  const void *mean, *invstd, *weight, *bias;
};

// g stands for 0 in every formula where not low <= x <= high; null: for itself everywhere.
struct ReluBoundVectors {
  const void *low, *high;
};

// sum(g) and sum(g*(x - mean)*invstd).
struct SumVectors {
  const void *mean, *invstd;
  ReluBoundVectors relu_bounds;
};

// grad_x = scale*(g - mean_g - (x - mean)*slope), with scale = invstd*weight and slope = invstd*mean(g*xhat), both
// multiplied in double and rounded once. Inference, slope == nullptr: scale*g; x is read for the gate alone.
struct GradientVectors {
  const void *mean, *scale, *mean_g, *slope;
  ReluBoundVectors relu_bounds;
};

struct Kernels {
  // Vectors start with the first of the channels; where there are sums, there are at most kMaxRowChannels of them.
  // `ahead`: elements from this tile to the one that will be read after it, which is asked for while this one is read.
  void (*row_welford)(const void* x, Tile tile, int64_t ahead, int channels, double floor, Partial* of_tile);
  // `residual`, where there is one, and `relu`: y = relu(v + residual) of what AffineVectors gives.
  void (*row_normalize)(const void* x, const void* residual, void* y, Tile tile, int channels,
                        const AffineVectors& affine, bool relu, bool streamed);
  void (*row_sums)(const void* g, const void* x, Tile tile, int64_t ahead, int channels, const SumVectors& vectors,
                   Partial* of_tile);
  void (*row_gradient)(const void* g, const void* x, void* grad_x, Tile tile, int channels,
                       const GradientVectors& gradient, bool streamed);

  // At most kMaxColumns columns. Vectors start with the first of them.
  // merges the tile into the moments of `before` rows
  void (*column_welford)(const void* x, Tile tile, double floor, int64_t before, double* mean, double* squares);
  // `backwards`: results from the tile's end to its beginning.
  void (*column_normalize)(const void* x, const void* residual, void* y, Tile tile, const AffineVectors& affine,
                           bool relu, bool streamed, bool backwards);
  // adds the tile's sums
  void (*column_sums)(const void* g, const void* x, Tile tile, const SumVectors& vectors, double* sum_g,
                      double* sum_gx);
  void (*column_gradient)(const void* g, const void* x, void* grad_x, Tile tile, const GradientVectors& gradient,
                          bool streamed, bool backwards);

  // After results were written past the cache (streamed), before another thread may read them.
  void (*end_of_stream)();
};

// One definition in each level_*.cpp.
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

// Of the level chosen at run time (simd_level.cpp).
const Kernels& kernels(Dtype dtype);

}  // namespace bnk::cpu
