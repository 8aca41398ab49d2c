// Kernels: what a SIMD level computes. One table for each level and dtype; the schedules (rows.cpp, columns.cpp) call
// through it and know nothing of instructions.
//
// Two shapes of work, after the two layouts:
//
//   row kernels     one channel:    `rows` runs of `length` contiguous elements, `stride` elements apart (channels-first)
//   column kernels  many channels:  `rows` x `columns` elements, rows `stride` apart, a column to a channel (channels-last)
//
// Statistics come in tiles small enough for the first-level cache and for short float chains: the mean first, then the
// centred squares of the same tile, leaving as double. A tile whose float arithmetic overflows (or, for the sum of squares,
// falls below `floor`, where float's underflow would count) is done again in double.
// Pointers may be aligned to their element only. No kernel allocates or throws.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace bnk::cpu {

struct Tile {
  int64_t rows;
  int64_t length;  // of a run; of a column kernel: the number of columns
  int64_t stride;  // elements from a row to the next
};

// The forward's coefficients, y = (x - mean)*invstd*weight + bias.
struct Affine {
  double mean, invstd, weight, bias;
};

// The backward's, grad_x = scale*(g - mean_g - (x - mean)*invstd*mean_gx); x == nullptr (inference): scale*g.
struct Gradient {
  double mean, invstd, scale, mean_g, mean_gx;
};

// The same by column: vectors of the arithmetic type.
struct AffineVectors {
  const void *mean, *invstd, *weight, *bias;
};

struct GradientVectors {
  const void *mean, *invstd, *scale, *mean_g, *mean_gx;  // inference: scale only
};

struct Kernels {
  // mean and the sum of centred squares of the tile
  void (*row_moments)(const void* x, Tile tile, double floor, double* mean, double* squares);
  void (*row_normalize)(const void* x, void* y, Tile tile, const Affine& affine);
  // adds sum(g) and sum(g*xhat) of the tile
  void (*row_sums)(const void* g, const void* x, Tile tile, double mean, double invstd, double* sum_g, double* sum_gx);
  void (*row_gradient)(const void* g, const void* x, void* grad_x, Tile tile, const Gradient& gradient);

  // merges the tile into the columns' moments of `before` rows (Chan et al. 1983)
  void (*column_moments)(const void* x, Tile tile, double floor, int64_t before, double* mean, double* squares);
  void (*column_normalize)(const void* x, void* y, Tile tile, const AffineVectors& affine);
  void (*column_sums)(const void* g, const void* x, Tile tile, const void* mean, const void* invstd, double* sum_g,
                      double* sum_gx);
  void (*column_gradient)(const void* g, const void* x, void* grad_x, Tile tile, const GradientVectors& gradient);
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

// Of the level chosen at run time (simd_level.cpp).
const Kernels& kernels(Dtype dtype);

}  // namespace bnk::cpu
