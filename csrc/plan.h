// Plan: HOW a problem is computed on a device: which threads visit which elements.
//
// Pure host C++: from a Problem and a DeviceLimits alone, no CUDA call, so that every decision can be tested, and
// printed, on a machine without a GPU. All numbers that tune live in plan_*.cpp.
#pragma once

#include "problem.h"

namespace bnk {

// Upper bounds that kernels size their shared memory and registers by.
inline constexpr int kMaxBlockThreads = 256;
inline constexpr int kMaxLanes = 8;

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
  int max_cluster;  // blocks of a hardware cluster; 0: it has none
};

// A number to divide by on the device, where a 64-bit division is a function call.
struct Divisor {
  int64_t value;
  double reciprocal;
};

// How a walk sees the array.
//
// channels-first: a slab is one channel. Its rows are the `outer` runs of `inner` contiguous elements, and each row is
//   covered by `windows` windows. Rows start anywhere, so the first and last window of a row may be partial, and with
//   some starts the last one is empty. A chunk is a range of the channel's outer*windows windows; the threads of a block
//   take them in turn.
// channels-last (inner == 1): a slab is `lanes` vectors of neighbouring channels, a chunk a range of rows. Thread t of a
//   block stays on vector t % lanes of the slab and takes the chunk's rows t/lanes, t/lanes + threads/lanes, ...
// packed: channels-first with short rows, walked as channels-last is. Its `outer` rows have channels*inner columns, of
//   which every `inner` ones are a channel's: rows of 49 elements start anywhere, rows of 8*49 on a vector. A slab is a
//   number of whole channels and of whole vectors, and a vector holds elements of two channels at most.
enum class Layout : int8_t { kChannelsFirst, kChannelsLast, kPacked };

// Walk: how blocks and threads cover an [outer][channels][inner] array.
//
// The array is cut into slabs of channels, each slab into chunks; one (slab, chunk) is a share, the work of one block.
// The unit of access is the window: the elements of one kVectorBytes-aligned vector.
struct Walk {
  Layout layout;
  int64_t outer;
  int64_t channels;
  int64_t inner;
  Divisor slabs;
  int64_t chunks;        // of each slab
  int64_t chunk_size;    // channels-first: windows; channels-last: rows
  Divisor windows;       // of a row; channels-first only
  int64_t step_rows;     // channels-first only: block threads / windows ...
  int64_t step_windows;  // ... and the remainder
  int lanes;             // channels-first: 1; channels-last: a power of two
  int slab_channels;
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
// normalize. Backward: grad_sums -> finalize -> grad_input. Works for every problem and every device. Blocks take shares
// round-robin, so any grid size is correct.
struct StreamingPlan {
  Walk walk;
  Finish finish;
  Launch walk_launch;
  Launch finish_launch;
};

// How the blocks of a group tell each other what they found.
enum class Group : int8_t {
  kBlock,           // there is one
  kCluster,         // a hardware cluster: through each other's shared memory
  kVirtualCluster,  // through global memory; a cooperative launch keeps all blocks on the device
};

// The resident path: one launch, in which groups of co-resident blocks read a slab once, keep it on chip, and write the
// result from there. Forward training and backward of training.
//
// Group g takes the slabs g, g + groups, ...; block `rank` of a group is its rank-th `members` and takes chunk `rank` of
// each. The first `kept` windows of each thread's share, of each tensor that is read, stay in shared memory; what is
// behind them is read again for the result, last first.
struct ResidentPlan {
  Walk walk;  // chunks: one for each member
  Group group;
  int members;           // blocks of a group
  int groups;            // that run at a time
  int kept;              // windows of each tensor, of each thread
  Launch launch;         // grid: groups * members
  int64_t shared_bytes;  // of a block, for what is kept
  // How the members' partials of a channel are joined: by every member for itself, or, in a large virtual cluster, each
  // channel by one member, which costs a second barrier.
  bool divided;
  int join_lanes;  // channels that a block joins side by side, as in Finish
};

// aligned: the tensor that windows are aligned to starts on a vector boundary.
StreamingPlan plan_streaming(const Problem& problem, bool aligned, const DeviceLimits& limits);

// The same with a given block size and a wish for a number of chunks: what plan_streaming builds on, and tests vary.
StreamingPlan make_streaming(const Problem& problem, bool aligned, int block, int64_t chunks);

// A thread for each of so many values: how the rows of several ranks are joined (problem_sync.h).
Launch plan_join(int64_t values);

// What a call computes: forward in training or inference, backward of either.
enum class Pass : int8_t { kForwardTrain, kForwardEval, kBackwardTrain, kBackwardEval };

// Tensors of the problem's size that a pass reads.
constexpr int tensors_read(Pass pass) { return pass == Pass::kForwardTrain || pass == Pass::kForwardEval ? 1 : 2; }

// Everything about a resident plan that is a choice, for tests to vary; the rest follows.
struct ResidentChoice {
  Layout layout;
  int lanes;    // channels-last and packed
  int block;    // threads
  int members;  // at most: as many as there are chunks
  int groups;
  int kept;  // windows
  bool divided;
  bool cluster;  // where there are several members
};

// Windows that a thread loads at a time, of each tensor.
inline constexpr int kResidentTile = 4;
// Blocks of resident_threads() that share a multiprocessor: while those of one group wait for each other, those of another
// move memory.
inline constexpr int kResidentBlocks = 2;
template <Layout kLayout>
inline constexpr int kMaxSlabChannels = kLayout == Layout::kChannelsFirst ? 1 : 64;
// Threads of a resident block, at most. Where each of a window's elements is of its own channel, as many sums and
// coefficients want registers.
constexpr int resident_threads(Layout layout) { return layout == Layout::kChannelsFirst ? kMaxBlockThreads : 192; }
inline constexpr int kMaxPackedLanes = 192;
// Bytes of a block's shared memory that a resident kernel takes for itself, at most.
constexpr int64_t resident_overhead(Layout layout) {
  return layout == Layout::kChannelsFirst ? 1024 : layout == Layout::kChannelsLast ? 10 * 1024 : 15 * 1024;
}

ResidentPlan make_resident(const Problem& problem, bool aligned, Pass pass, const ResidentChoice& choice);

// Bytes of global memory.
struct Traffic {
  int64_t read;
  int64_t written;
};

enum class Path : int8_t { kStreaming, kResident };

// Why a call takes the streaming path.
enum class Reason : int8_t {
  kNone,           // it does not
  kForced,         // the caller asked for it
  kNoReduction,    // inference: streaming is the floor already
  kNoCooperation,  // large groups need a cooperative launch, which the device does not have
  kNotResident,    // too little of a slab would stay on chip
};

struct Plan {
  Path path;
  Reason reason;
  StreamingPlan streaming;  // always there
  ResidentPlan resident;
  Traffic floor;      // of the pass: each tensor once
  Traffic predicted;  // tensors of the problem's size only
  Traffic exchanged;  // what blocks tell each other: partials and their joins
};

struct PlanOptions {
  bool force_streaming;
};

Plan plan_pass(const Problem& problem, Pass pass, bool aligned, const DeviceLimits& limits, const PlanOptions& options);

}  // namespace bnk
