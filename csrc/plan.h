// Plan: HOW a problem is computed on a device: which threads visit which elements.
//
// Pure host C++: from a Problem and a DeviceLimits alone, no CUDA call, so that every decision can be tested, and
// printed, on a machine without a GPU. All numbers that tune live in plan.cpp.
#pragma once

#include "problem.h"

namespace bnk {

// Upper bounds that kernels size their shared memory and registers by.
inline constexpr int kMaxBlockThreads = 256;
inline constexpr int kMaxLanes = 8;

struct DeviceLimits {
  int multiprocessors;
  int max_threads_per_multiprocessor;
};

// A number to divide by on the device, where a 64-bit division is a function call.
struct Divisor {
  int64_t value;
  double reciprocal;
};

// Walk: how blocks and threads cover an [outer][channels][inner] array.
//
// The array is cut into slabs of channels, each slab into chunks; one (slab, chunk) is a share, the work of one block.
// Blocks take shares round-robin, so any grid size is correct. The unit of access is the window: the elements of one
// kVectorBytes-aligned vector.
//
// channels-first (inner > 1): a slab is one channel. Its rows are the `outer` runs of `inner` contiguous elements, and
//   each row is covered by `windows` windows. Rows start anywhere, so the first and last window of a row may be partial,
//   and with some starts the last one is empty. A chunk is a range of the channel's outer*windows windows; the threads
//   of a block take them in turn.
// channels-last (inner == 1): a slab is `lanes` vectors of neighbouring channels, a chunk a range of rows. Thread t of a
//   block stays on vector t % lanes of the slab and takes the chunk's rows t/lanes, t/lanes + threads/lanes, ...
struct Walk {
  int64_t outer;
  int64_t channels;
  int64_t inner;
  Divisor slabs;
  int64_t chunks;        // of each slab
  int64_t chunk_size;    // channels-first: windows; channels-last: rows
  Divisor windows;       // of a row; channels-first only
  int64_t step_rows;     // channels-first only: block threads / windows ...
  int64_t step_windows;  // ... and the remainder
  int lanes;             // channels-first: 1
};

struct Launch {
  int64_t grid;
  int block;
};

// How each channel is finished from its partials: `lanes` channels side by side, and all threads of the same lane share
// one channel's chunks.
struct Finish {
  int64_t channels;
  int64_t chunks;
  int lanes;  // a power of two <= 32
};

// The streaming path. Forward training: statistics (x -> one partial per share) -> finalize -> normalize. Inference:
// normalize. Backward: grad_sums -> finalize -> grad_input. Works for every problem and every device.
struct StreamingPlan {
  Walk walk;
  Finish finish;
  Launch walk_launch;
  Launch finish_launch;
};

// aligned: the tensor that windows are aligned to starts on a vector boundary.
StreamingPlan plan_streaming(const Problem& problem, bool aligned, const DeviceLimits& limits);

// The same with a given block size and a wish for a number of chunks: what plan_streaming builds on, and tests vary.
StreamingPlan make_streaming(const Problem& problem, bool aligned, int block, int64_t chunks);

}  // namespace bnk
