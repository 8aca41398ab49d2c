// The engine: runs a grid of threads as fibers, interleaved as a seed or a schedule tells, and watches over them.
//
//   simt::Report report = simt::launch({.grid = 4, .block = 64, .seed = 7}, [&] { kernel<float>(parameters); });
//
// Threads give way at every barrier, every shuffle and every wait for a group. What ends a launch, with a message that names
// block, thread and line:
//   - a divergent barrier: threads of one block at different barriers, or some returned while others wait
//   - a divergent shuffle: a lane of the warp returned, or waits elsewhere
//   - a deadlock: no thread can move (who waits where, who has returned)
//   - an access to global memory out of bounds or misaligned (buffers.h)
//   - shared memory written beside its arrays, or more of it than a block may have
//   - shared memory of another block of a cluster read before that block has surely started, or when it may have ended
// Shuffles order no memory, and barriers only their block's or cluster's, as the race detector is told; it finds the rest.
//
// One launch at a time, on one thread of the host. Consecutive launches are ordered, as on one CUDA stream.
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
inline constexpr unsigned kMaxCluster = 8;              // that every device with clusters has
inline constexpr size_t kSharedBytes = 48 * 1024;       // of static shared memory: CUDA's limit for a block
inline constexpr size_t kMaxDynamicBytes = 227 * 1024;  // and of dynamic: the most that any device gives

struct Launch {
  unsigned grid = 1;
  unsigned block = kWarp;  // a multiple of a warp, at most kMaxBlock
  unsigned cluster = 1;    // blocks, at most kMaxCluster, that start together and whose shared memory is one another's
  uint64_t seed = 0;
  Schedule schedule = Schedule::kSeeded;
  size_t dynamic_bytes = 0;      // of shared memory
  unsigned resident_blocks = 0;  // blocks that run at a time, the next starting where one ended; 0: all
  size_t first_block = 0;        // these are blocks first_block and on ...
  size_t of_blocks = 0;          // ... of a grid of so many, of which the others do not run; 0: of `grid`
  std::string without{};         // "file:line" of a barrier that is not kept, for tests to see that it is missed
};

struct Report {
  std::string fault;  // empty: the launch ran to its end
  std::vector<Traffic> traffic;
  size_t switches = 0;
  std::set<std::string> barriers;  // "file:line" of those that were met

  bool ok() const { return fault.empty(); }
  // Bytes of one buffer, by name. 0 for a name that is not there.
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
// Where, in the shared memory of the rank-th block of the cluster, lies what `own` is in the calling block's.
const void* of_member(const void* own, unsigned rank, const Site& site);

// Of the primitives' meaning (csrc/cuda/ptx.cuh). `counter` is a device address.
void group_barrier(unsigned* counter, unsigned group_size, unsigned rank, const Site& site);
bool last_to_arrive(unsigned* counter, unsigned count, const Site& site);

// Faults where two threads of the launch pass different bits at one place with one key.
void expect_uniform(int64_t key, double value, const Site& site);

// What a group barrier is made of. arrive: release of all that this thread knows of, and `step` more on the counter; what
// it was before. wait_for_flip: until its top bit is another than that of `before`, then acquire.
unsigned arrive(unsigned* counter, unsigned step, const Site& site);
void wait_for_flip(const unsigned* counter, unsigned before, const Site& site);

// The block's array of this key, poisoned when the block starts: the same for every thread of the block.
void* shared_array(const void* key, const char* name, size_t bytes, const Site& site);

// The launch's dynamic shared memory.
void* dynamic_shared(const Site& site);

// Ends the launch: every thread is unwound, and the report carries the message.
[[noreturn]] void fault(const std::string& what, const Site& site);

}  // namespace simt
