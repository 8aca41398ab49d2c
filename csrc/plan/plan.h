// Plan: how a problem is computed on a device, that is, which threads visit which elements.
//
// Pure host C++: depends only on a Problem and a DeviceLimits and makes no CUDA call, so every decision can be tested
// and printed on a machine without a GPU. All tuning constants live in csrc/plan/*.cpp.
#pragma once

#include "../core/problem.h"

namespace bnk {

// Bytes of a vector access: the widest load and store of a thread.
inline constexpr int kVectorBytes = 16;

// Upper bounds for the kernels' shared memory and registers.
inline constexpr int kMaxBlockThreads = 256;
inline constexpr int kMaxThreadsC = 8;

// Words of a launch's barrier workspace: word 0 serves the whole launch, word 1 + g serves group g. Each word lies in a
// memory sector of its own.
inline constexpr int kMaxBarrierGroups = 511;
inline constexpr int kBarrierWords = 1 + kMaxBarrierGroups;
inline constexpr int kBarrierWordBytes = 32;

// Device limits, as reported by CUDA's device attributes.
struct DeviceLimits {
  int multiprocessors;
  int max_threads_per_multiprocessor;
  int max_blocks_per_multiprocessor;
  int64_t shared_per_multiprocessor;  // bytes
  int64_t shared_per_block;           // bytes, the opt-in limit per block
  int64_t shared_reserved;            // bytes per block reserved by the system
  bool cooperative_launch;
  int max_cluster;  // blocks per cluster; 0: no cluster support
};

// A divisor with its reciprocal, because a 64-bit division on the device is a function call.
struct Divisor {
  int64_t value;
  double reciprocal;
};

// How a partition interprets the array.
//
// channels-first: a channel tile is one channel. Its rows are the `outer` runs of `inner` contiguous elements, and each
//   row is covered by `row_vectors` vectors. Rows may start anywhere, so the first and last vector of a row may be
//   partial, and for some starts the last one is empty. A split is a range of the channel's outer*row_vectors vectors,
//   which the threads of a CTA visit in a strided loop.
// channels-last (inner == 1): a channel tile is `threads_c` vectors of adjacent channels, a split is a range of rows.
//   Thread t of a CTA visits vector t % threads_c of the channel tile, in the split's rows t/threads_c,
//   t/threads_c + threads/threads_c, ...
// packed: channels-first data with short rows, visited like channels-last. Each of the `outer` rows has channels*inner
//   columns, `inner` consecutive ones per channel: a run of 49 elements starts anywhere, a run of 8*49 on a vector
//   boundary. A channel tile is a whole number of channels and of vectors, and a vector holds elements of at most two
//   channels.
enum class Layout : int8_t { kChannelsFirst, kChannelsLast, kPacked };

// TilePartition: how CTAs and threads cover an [outer][channels][inner] array.
//
// The channels are cut into channel tiles and each channel tile into splits; one (channel tile, split) is a work tile,
// the work of one CTA. The unit of access is the vector: the elements of one kVectorBytes-aligned vector.
struct TilePartition {
  Layout layout;
  int64_t outer;
  int64_t channels;
  int64_t inner;
  Divisor channel_tiles;
  int64_t splits;        // per channel tile
  int64_t split_size;    // channels-first: vectors; channels-last: rows
  Divisor row_vectors;   // vectors per row; channels-first only
  int64_t step_rows;     // channels-first only: block threads / row_vectors ...
  int64_t step_vectors;  // ... and the remainder
  int threads_c;         // channels-first: 1; channels-last: a power of two
  int tile_channels;
};

struct Launch {
  int64_t grid;
  int block;
};

// How each channel's partials are combined: a CTA handles `threads_c` adjacent channels at once, and the threads with
// the same index along C divide one channel's splits.
struct Finalize {
  int64_t channels;
  int64_t splits;
  int threads_c;  // a power of two <= 32
};

// The two-pass path. Training forward: statistics (x -> one partial per work tile) -> finalize -> normalize. Inference
// forward: normalize. Backward: grad_sums -> finalize -> grad_input. Works for every problem and every device. CTAs
// take work tiles round-robin, so any grid size is correct.
struct TwoPassPlan {
  TilePartition partition;
  Finalize finalize;
  Launch tile_launch;
  Launch finalize_launch;
};

// How the CTAs of a group exchange their partials.
enum class GroupKind : int8_t {
  kCta,      // a single CTA: no exchange
  kCluster,  // a thread block cluster: through distributed shared memory
  kGrid,     // through global memory; a cooperative launch keeps all CTAs resident
};

// The persistent kernel: one launch, in which groups of co-resident CTAs read a channel tile once, cache it on chip,
// and compute the result from there. Training forward, and backward of the training forward.
//
// Group g takes the channel tiles g, g + groups, ...; the CTA of rank r in its group takes split r of each. The first
// `cached_vectors` vectors of each thread, of each tensor read, stay in shared memory. The remaining vectors are read a
// second time for the result, in reverse order.
struct PersistentPlan {
  TilePartition partition;  // one split per CTA of a group
  GroupKind group;
  int group_size;        // CTAs per group
  int groups;            // groups that run at once
  int cached_vectors;    // vectors per thread of each tensor
  Launch launch;         // grid: groups * group_size
  int64_t shared_bytes;  // cache per CTA
  // How the group all-reduces a channel's partials. One-shot: every CTA combines all channels. Two-shot (large grid
  // groups): each channel is combined by one CTA, which costs a second barrier.
  bool two_shot;
  int combine_threads_c;  // channels that a CTA combines at once, as in Finalize
};

// aligned: the tensor to which vectors are aligned starts on a vector boundary.
TwoPassPlan plan_two_pass(const Problem& problem, bool aligned, const DeviceLimits& limits);

// The same with a given block size and a requested number of splits. plan_two_pass builds on it, and tests vary the
// arguments.
TwoPassPlan make_two_pass(const Problem& problem, bool aligned, int block, int64_t splits);

// One thread per value, for combining the rows of several ranks (problem_sync.h).
Launch plan_combine(int64_t values);

// The pass that a call computes.
enum class Pass : int8_t { kForwardTrain, kForwardEval, kBackwardTrain, kBackwardEval };

// Problem-sized tensors that a pass reads.
constexpr int tensors_read(Pass pass) { return pass == Pass::kForwardTrain || pass == Pass::kForwardEval ? 1 : 2; }

// The free choices of a persistent plan, which tests vary; everything else follows from them.
struct PersistentChoice {
  Layout layout;
  int threads_c;   // channels-last and packed
  int block;       // threads
  int group_size;  // upper bound: the partition may have fewer splits
  int groups;
  int cached_vectors;  // vectors
  bool two_shot;
  bool cluster;  // if the group has more than one CTA
};

// Vectors of each tensor that a thread loads per tile.
inline constexpr int kVectorsPerThread = 4;
// CTAs of persistent_threads() that share a multiprocessor: while the CTAs of one group wait for each other, those of
// another move memory.
inline constexpr int kMinBlocksPerMultiprocessor = 2;
template <Layout kLayout>
inline constexpr int kMaxTileChannels = kLayout == Layout::kChannelsFirst ? 1 : 64;
// Maximum threads of a persistent CTA. Where each element of a vector has its own channel, its sums and coefficients
// need more registers per thread.
constexpr int persistent_threads(Layout layout) { return layout == Layout::kChannelsFirst ? kMaxBlockThreads : 192; }
inline constexpr int kMaxPackedThreadsC = 192;
// Upper bound of the static shared memory of a persistent kernel, in bytes.
constexpr int64_t persistent_overhead(Layout layout) {
  return layout == Layout::kChannelsFirst ? 1024 : layout == Layout::kChannelsLast ? 10 * 1024 : 15 * 1024;
}

PersistentPlan make_persistent(const Problem& problem, bool aligned, Pass pass, const PersistentChoice& choice);

// Bytes of global memory.
struct Traffic {
  int64_t read;
  int64_t written;
};

enum class Path : int8_t { kTwoPass, kPersistent };

// Why a call takes the two-pass path.
enum class Reason : int8_t {
  kNone,           // it takes the persistent kernel
  kForced,         // forced by the caller
  kNoReduction,    // inference: the two-pass path already reaches the traffic floor
  kNoCooperation,  // large groups need a cooperative launch, which the device does not support
  kDoesNotFit,     // too little of a channel tile would fit on chip
};

struct Plan {
  Path path;
  Reason reason;
  TwoPassPlan two_pass;  // always valid
  PersistentPlan persistent;
  Traffic floor;      // each tensor once
  Traffic predicted;  // problem-sized tensors only
  Traffic exchanged;  // between CTAs: partials and their combined values
};

struct PlanOptions {
  bool force_two_pass;
};

Plan plan_pass(const Problem& problem, Pass pass, bool aligned, const DeviceLimits& limits, const PlanOptions& options);

}  // namespace bnk
