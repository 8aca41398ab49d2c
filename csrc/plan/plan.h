// Plan: HOW a problem is computed on a device: which threads visit which elements.
//
// Pure host C++: from a Problem and a DeviceLimits alone, no CUDA call, so that every decision can be tested, and
// printed, on a machine without a GPU. All numbers that tune live in plan_*.cpp.
#pragma once

#include "../core/problem.h"

namespace bnk {

// Upper bounds that kernels size their shared memory and registers by.
inline constexpr int kMaxBlockThreads = 256;
inline constexpr int kMaxThreadsC = 8;

// Words of a launch's barrier workspace: word 0 is the launch's, word 1 + g that of group g. Each lies in a memory sector
// of its own.
inline constexpr int kMaxBarrierGroups = 511;
inline constexpr int kBarrierWords = 1 + kMaxBarrierGroups;
inline constexpr int kBarrierWordBytes = 32;

// What a device has, as CUDA's device attributes tell it.
struct DeviceLimits {
  int multiprocessors;
  int max_threads_per_multiprocessor;
  int max_blocks_per_multiprocessor;
  int64_t shared_per_multiprocessor;  // bytes
  int64_t shared_per_block;           // bytes that a block may ask for (the opt-in limit)
  int64_t shared_reserved;            // bytes that the system takes of each block's
  bool cooperative_launch;
  int max_cluster;  // blocks of a cluster; 0: it has none
};

// A number to divide by on the device, where a 64-bit division is a function call.
struct Divisor {
  int64_t value;
  double reciprocal;
};

// How a partition sees the array.
//
// channels-first: a channel tile is one channel. Its rows are the `outer` runs of `inner` contiguous elements, and each row is
//   covered by `vectors` vectors. Rows start anywhere, so the first and last vector of a row may be partial, and with
//   some starts the last one is empty. A split is a range of the channel's outer*vectors vectors; the threads of a block
//   take them in turn.
// channels-last (inner == 1): a channel tile is `lanes` vectors of neighbouring channels, a split a range of rows. Thread t of a
//   block stays on vector t % lanes of the channel tile and takes the split's rows t/lanes, t/lanes + threads/lanes, ...
// packed: channels-first with short rows, walked as channels-last is. Its `outer` rows have channels*inner columns, of
//   which every `inner` ones are a channel's: rows of 49 elements start anywhere, rows of 8*49 on a vector. A channel tile is a
//   number of whole channels and of whole vectors, and a vector holds elements of two channels at most.
enum class Layout : int8_t { kChannelsFirst, kChannelsLast, kPacked };

// TilePartition: how blocks and threads cover an [outer][channels][inner] array.
//
// The array is cut into channel tiles of channels, each channel tile into splits; one (channel tile, split) is a share, the work of one block.
// The unit of access is the vector: the elements of one kVectorBytes-aligned vector.
struct TilePartition {
  Layout layout;
  int64_t outer;
  int64_t channels;
  int64_t inner;
  Divisor channel_tiles;
  int64_t splits;        // of each channel tile
  int64_t split_size;    // channels-first: vectors; channels-last: rows
  Divisor row_vectors;   // of a row; channels-first only
  int64_t step_rows;     // channels-first only: block threads / vectors ...
  int64_t step_vectors;  // ... and the remainder
  int threads_c;         // channels-first: 1; channels-last: a power of two
  int tile_channels;
};

struct Launch {
  int64_t grid;
  int block;
};

// How each channel is finished from its partials: `lanes` channels side by side, and all threads of the same lane share
// one channel's splits.
struct Finalize {
  int64_t channels;
  int64_t splits;
  int threads_c;  // a power of two <= 32
};

// The two-pass path. Forward training: statistics (x -> one partial per share) -> finalize -> normalize. Inference:
// normalize. Backward: grad_sums -> finalize -> grad_input. Works for every problem and every device. Blocks take shares
// round-robin, so any grid size is correct.
struct TwoPassPlan {
  TilePartition partition;
  Finalize finalize;
  Launch tile_launch;
  Launch finalize_launch;
};

// How the blocks of a group tell each other what they found.
enum class GroupKind : int8_t {
  kCta,      // there is one
  kCluster,  // a cluster: through each other's shared memory
  kGrid,     // through global memory; a cooperative launch keeps all blocks on the device
};

// The persistent kernel: one launch, in which groups of co-persistent blocks read a channel tile once, keep it on chip, and write the
// result from there. Forward training and backward of training.
//
// Group g takes the channel tiles g, g + groups, ...; block `rank` of a group is its rank-th `members` and takes split `rank` of
// each. The first `kept` vectors of each thread's share, of each tensor that is read, stay in shared memory; what is
// behind them is read again for the result, last first.
struct PersistentPlan {
  TilePartition partition;  // splits: one for each member
  GroupKind group;
  int group_size;        // blocks of a group
  int groups;            // that run at a time
  int cached_vectors;    // vectors of each tensor, of each thread
  Launch launch;         // grid: groups * members
  int64_t shared_bytes;  // of a block, for what is kept
  // How the members' partials of a channel are joined: by every member for itself, or, in a large grid group, each
  // channel by one member, which costs a second barrier.
  bool two_shot;
  int combine_threads_c;  // channels that a block joins side by side, as in Finish
};

// aligned: the tensor that vectors are aligned to starts on a vector boundary.
TwoPassPlan plan_two_pass(const Problem& problem, bool aligned, const DeviceLimits& limits);

// The same with a given block size and a wish for a number of splits: what plan_two_pass builds on, and tests vary.
TwoPassPlan make_two_pass(const Problem& problem, bool aligned, int block, int64_t splits);

// A thread for each of so many values: how the rows of several ranks are joined (problem_sync.h).
Launch plan_combine(int64_t values);

// What a call computes: forward in training or inference, backward of either.
enum class Pass : int8_t { kForwardTrain, kForwardEval, kBackwardTrain, kBackwardEval };

// Tensors of the problem's size that a pass reads.
constexpr int tensors_read(Pass pass) { return pass == Pass::kForwardTrain || pass == Pass::kForwardEval ? 1 : 2; }

// Everything about a persistent plan that is a choice, for tests to vary; the rest follows.
struct PersistentChoice {
  Layout layout;
  int threads_c;   // channels-last and packed
  int block;       // threads
  int group_size;  // at most: as many as there are splits
  int groups;
  int cached_vectors;  // vectors
  bool two_shot;
  bool cluster;  // where there are several members
};

// Windows that a thread loads at a time, of each tensor.
inline constexpr int kVectorsPerThread = 4;
// Blocks of persistent_threads() that share a multiprocessor: while those of one group wait for each other, those of another
// move memory.
inline constexpr int kMinBlocksPerMultiprocessor = 2;
template <Layout kLayout>
inline constexpr int kMaxTileChannels = kLayout == Layout::kChannelsFirst ? 1 : 64;
// Threads of a persistent block, at most. Where each of a vector's elements is of its own channel, as many sums and
// coefficients want registers.
constexpr int persistent_threads(Layout layout) { return layout == Layout::kChannelsFirst ? kMaxBlockThreads : 192; }
inline constexpr int kMaxPackedThreadsC = 192;
// Bytes of a block's shared memory that a persistent kernel takes for itself, at most.
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
  kNone,           // it does not
  kForced,         // the caller asked for it
  kNoReduction,    // inference: streaming is the floor already
  kNoCooperation,  // large groups need a cooperative launch, which the device does not have
  kDoesNotFit,     // too little of a channel tile would stay on chip
};

struct Plan {
  Path path;
  Reason reason;
  TwoPassPlan two_pass;  // always there
  PersistentPlan persistent;
  Traffic floor;      // of the pass: each tensor once
  Traffic predicted;  // tensors of the problem's size only
  Traffic exchanged;  // what blocks tell each other: partials and their joins
};

struct PlanOptions {
  bool force_two_pass;
};

Plan plan_pass(const Problem& problem, Pass pass, bool aligned, const DeviceLimits& limits, const PlanOptions& options);

}  // namespace bnk
