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

// Elements of a window.
int vector_elements(Dtype dtype);

// Units of a slab that chunks divide: windows (channels-first) or rows.
int64_t slab_units(const Problem& problem, Layout layout, bool aligned);

// Vectors of a channels-last slab, if it is as wide as may be.
int widest_lanes(const Problem& problem);

Walk make_walk(const Problem& problem, Layout layout, int lanes, bool aligned, int block, int64_t chunks);

// Channels that a block joins side by side, so that its threads have something to do: the more chunks, the fewer.
int join_lanes(int64_t channels, int64_t chunks);

}  // namespace bnk
