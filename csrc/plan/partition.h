// Building blocks shared by the plans of both paths. Internal to csrc/plan/*.cpp.
#pragma once

#include "plan.h"

namespace bnk {

inline constexpr int kPlanWarp = 32;
inline constexpr int64_t kMaxGrid = 0x7fffffff;

// Maximum vectors per thread for float64 data. Its sums have only the data's own precision, and equal values added in
// sequence all round the same way: the length of the sequential sum, not the tree reduction above it, determines the
// error. (Sums of smaller dtypes are combined in double, where no length is too long.)
inline constexpr int64_t kMaxVectorsPerThreadFloat64 = 128;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

Divisor make_divisor(int64_t value);

// The smallest power of two >= value, but at most `limit`, itself a power of two.
int power_of_two_at_least(int64_t value, int limit);

// Elements per vector.
int vector_elements(Dtype dtype);

// Units of a channel tile, which the splits divide: vectors (channels-first) or rows (channels-last, packed).
int64_t tile_units(const Problem& problem, Layout layout, bool aligned);

// Vectors per row of the widest channels-last channel tile.
int widest_threads_c(const Problem& problem);

TilePartition make_partition(const Problem& problem, Layout layout, int threads_c, bool aligned, int block,
                             int64_t splits);

// Channels that a CTA combines at once: fewer when there are more splits, so that all threads have work.
int combine_threads_c(int64_t channels, int64_t splits);

}  // namespace bnk
