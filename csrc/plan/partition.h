// What both paths' plans are made of. Internal to plan*.cpp.
#pragma once

#include "plan.h"

namespace bnk {

inline constexpr int kPlanWarp = 32;
inline constexpr int64_t kMaxGrid = 0x7fffffff;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

Divisor make_divisor(int64_t value);

// The least power of two >= value, or `limit`, a power of two, if that is less.
int power_of_two_at_least(int64_t value, int limit);

// Elements of a vector.
int vector_elements(Dtype dtype);

// Units of a channel tile that splits divide: vectors (channels-first) or rows.
int64_t tile_units(const Problem& problem, Layout layout, bool aligned);

// Vectors of a channels-last channel tile, if it is as wide as may be.
int widest_threads_c(const Problem& problem);

TilePartition make_partition(const Problem& problem, Layout layout, int threads_c, bool aligned, int block,
                             int64_t splits);

// Channels that a block joins side by side, so that its threads have something to do: the more splits, the fewer.
int combine_threads_c(int64_t channels, int64_t splits);

}  // namespace bnk
