// The engine: runs a grid of threads as fibers, interleaved by a seed or a schedule, and detects faults.
//
//   simt::Report report = simt::launch({.grid = 4, .block = 64, .seed = 7}, [&] { kernel<float>(parameters); });
//
// Threads yield at every barrier, every shuffle and every wait for a group. The following end a launch, with a message
// that names block, thread and line:
//   - a divergent barrier: threads of one block are at different barriers, or some returned while others wait
//   - a divergent shuffle: a lane of the warp returned, or waits elsewhere
//   - a deadlock: no thread can run (lists which threads wait where, and which have returned)
//   - an access to global memory that is out of bounds or misaligned (buffers.h)
//   - a write to shared memory outside its arrays, or more shared memory than a block may have
//   - a read of another block's shared memory in a cluster before that block is known to have started, or when it may
//     have ended
// Shuffles order no memory, and a barrier orders only the memory of its block or cluster. The engine reports this to
// the race detector, which finds all other faults.
//
// Only one launch runs at a time, on one host thread. Consecutive launches are ordered, as on one CUDA stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "simt/buffers.h"
#include "simt/schedule.h"

namespace simt {

inline constexpr unsigned kWarp = 32;
inline constexpr unsigned kMaxBlock = 1024;
inline constexpr unsigned kMaxCluster = 8;              // available on every device with clusters
inline constexpr size_t kSharedBytes = 48 * 1024;       // static shared memory: CUDA's limit per block
inline constexpr size_t kMaxDynamicBytes = 227 * 1024;  // dynamic shared memory: the most that any device gives

struct Launch {
  unsigned grid = 1;
  unsigned block = kWarp;  // a multiple of a warp, at most kMaxBlock
  // blocks per cluster, at most kMaxCluster: start together and can read each other's shared memory
  unsigned cluster = 1;
  uint64_t seed = 0;
  Schedule schedule = Schedule::kSeeded;
  size_t dynamic_bytes = 0;      // of dynamic shared memory
  unsigned resident_blocks = 0;  // blocks that run at the same time; the next starts when one ends; 0: all
  size_t first_block = 0;        // run only blocks first_block to first_block + grid - 1 ...
  size_t of_blocks = 0;          // ... of a grid of this many blocks; 0: `grid`
  std::string without{};         // "file:line" of a barrier to skip, for tests that must detect its absence
};

struct Report {
  std::string fault;  // empty: the launch completed
  std::vector<Traffic> traffic;
  size_t switches = 0;
  std::set<std::string> barriers;  // "file:line" of the barriers that were reached

  bool ok() const { return fault.empty(); }
  // Bytes of one buffer, by name. 0 if there is no buffer of that name.
  size_t read(const std::string& buffer) const;
  size_t written(const std::string& buffer) const;
};

Report launch(const Launch& launch, void (*kernel)(void*), void* argument);

template <typename Kernel>
Report launch(const Launch& configuration, Kernel&& kernel) {
  using Body = std::remove_reference_t<Kernel>;
  return launch(configuration, [](void* body) { (*static_cast<Body*>(body))(); }, std::addressof(kernel));
}

// ---- what the running kernel calls ----------------------------------------------------------------------------------

struct Position {
  unsigned thread, threads, block, blocks;
};
const Position& position();

void block_barrier(const Site& site);
double shuffle_xor(double value, int mask, const Site& site);

void cluster_barrier(const Site& site);
// The address in the shared memory of the rank-th block of the cluster that corresponds to `own` in the calling
// block's.
const void* in_cta(const void* own, unsigned rank, const Site& site);

// The primitives of csrc/cuda/ptx.cuh. `counter` is a device address.
void group_barrier(unsigned* counter, unsigned group_size, unsigned rank, const Site& site);
bool last_to_arrive(unsigned* counter, unsigned count, const Site& site);

// Faults if two threads of the launch pass different bits at the same source location with the same key.
void expect_uniform(int64_t key, double value, const Site& site);

// The two halves of a group barrier. arrive: a release; adds `step` to the counter and returns its previous value.
// wait_for_flip: waits until the counter's top bit differs from that of `before`; then an acquire.
unsigned arrive(unsigned* counter, unsigned step, const Site& site);
void wait_for_flip(const unsigned* counter, unsigned before, const Site& site);

// The block's array for this key, poisoned when the block starts; the same array for every thread of the block.
void* shared_array(const void* key, const char* name, size_t bytes, const Site& site);

// The launch's dynamic shared memory.
void* dynamic_shared(const Site& site);

// Ends the launch: unwinds every thread; the report carries the message.
[[noreturn]] void fault(const std::string& what, const Site& site);

}  // namespace simt
