// Grid: one launch, with the state of its threads and the memory that they share. Internal to the engine:
//
//   engine.cpp           schedules the threads and detects the end of a launch
//   synchronisation.cpp  the synchronisation primitives
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "simt/engine.h"
#include "simt/fiber.h"
#include "simt/shared_memory.h"

namespace simt {

enum class State { kReady, kAtBarrier, kAtCluster, kAtShuffle, kWaiting, kReturned };

struct Thread {
  Position position;
  size_t fiber;
  bool started = false;
  State state = State::kReady;
  Site site;                          // of the call in which the thread waits
  const unsigned* counter = nullptr;  // the thread waits until the top bit of this counter ...
  unsigned before = 0;                // ... differs from that of this value
};

struct Block {
  size_t slot = 0;
  unsigned at_barrier = 0;
  unsigned returned = 0;
  // Barriers alternate between two tokens. With a single one, a thread that is already at the next barrier would
  // release its newer accesses to threads that have not yet left this one, and the detector would miss their races.
  unsigned phase = 0;
  char token[2];
  Site site;  // of the barrier at which the at_barrier threads wait
  char end_token;
};

// Blocks that start together. A block outside any cluster forms a cluster of one.
struct Cluster {
  unsigned at_barrier = 0;
  unsigned phase = 0;  // completed barriers; the tokens alternate as in Block
  char token[2];
  Site site;
};

struct Warp {
  unsigned at_shuffle = 0;
  unsigned at_barrier = 0;
  unsigned returned = 0;
  unsigned phase = 0;
  Site site;                // of the shuffle at which the at_shuffle lanes wait
  double values[2][kWarp];  // alternate: lanes may still read one shuffle's values while others write the next one's
};

inline constexpr unsigned kTopBit = 0x80000000u;
inline bool flipped(unsigned now, unsigned before) { return ((now ^ before) & kTopBit) != 0; }

// Thrown through the kernel's frames after a fault has ended the launch.
struct Unwind {};

// Reused across launches: creating them costs more than a small launch.
extern std::vector<std::unique_ptr<Fiber>> fibers;
extern std::vector<std::unique_ptr<SharedMemory>> arenas;

inline const char* file_of(const Site& site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return slash ? slash + 1 : site.file_name();
}

inline std::string describe(const Site& site) { return std::string(file_of(site)) + ":" + std::to_string(site.line()); }

inline bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

class Grid {
 public:
  Grid(const Launch& launch, void (*kernel)(void*), void* argument)
      : launch_(launch),
        kernel_(kernel),
        argument_(argument),
        scheduler_(launch.schedule, launch.seed, launch.grid, launch.block, kWarp),
        threads_(size_t{launch.grid} * launch.block),
        blocks_(launch.grid),
        clusters_(launch.grid / launch.cluster),
        warps_(threads_.size() / kWarp) {}

  Report run();
  void run_thread();

  const Position& position() const { return threads_[current_].position; }
  void block_barrier(const Site& site);
  void cluster_barrier(const Site& site);
  const void* in_cta(const void* own, unsigned rank, const Site& site);
  double shuffle_xor(double value, int mask, const Site& site);
  unsigned arrive(unsigned* counter, unsigned step, const Site& site);
  void wait_for_flip(const unsigned* counter, unsigned before, const Site& site);
  void group_barrier(unsigned* counter, unsigned group_size, unsigned rank, const Site& site);
  bool last_to_arrive(unsigned* counter, unsigned count, const Site& site);
  void expect_uniform(int64_t key, double value, const Site& site);
  void* shared_array(const void* key, const char* name, size_t bytes, const Site& site);
  void* dynamic_shared(const Site& site);
  [[noreturn]] void fault(const std::string& what, const Site& site);

 private:
  void start_block(size_t rank, size_t slot);
  void step();
  void unwind();
  void wake_waiting();
  void make_ready(size_t thread);
  void pause(State state, const Site& site);
  void met(const Site& barrier);
  bool is_left_out(const Site& barrier) const;
  std::string where(size_t first, size_t end) const;

  Block& block() { return blocks_[current_ / launch_.block]; }
  Cluster& cluster() { return clusters_[block_index() / launch_.cluster]; }
  Warp& warp() { return warps_[current_ / kWarp]; }
  size_t block_index() const { return current_ / launch_.block; }
  size_t first_of_block() const { return current_ / launch_.block * launch_.block; }
  size_t first_of_warp() const { return current_ / kWarp * kWarp; }

  const Launch launch_;
  void (*const kernel_)(void*);
  void* const argument_;
  Scheduler scheduler_;
  std::vector<Thread> threads_;
  std::vector<Block> blocks_;
  std::vector<Cluster> clusters_;
  std::vector<Warp> warps_;
  std::vector<size_t> waiting_;  // threads that wait for a counter
  size_t current_ = 0;
  size_t switches_ = 0;
  std::vector<Site> barriers_;  // reached by this launch
  std::map<std::tuple<const void*, unsigned, int64_t>, uint64_t>
      uniform_;  // by place and key: the bits that were passed first
  std::string fault_;
  char start_token_, end_token_;
};

}  // namespace simt
