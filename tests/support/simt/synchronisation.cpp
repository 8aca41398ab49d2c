// The synchronisation primitives. All of these run in the calling thread's fiber.
#include <algorithm>
#include <bit>
#include <cstdlib>

#include "simt/grid.h"

namespace simt {

void Grid::run_thread() {
  acquire(&start_token_);
  try {
    kernel_(argument_);
    if (block().at_barrier > 0) fault("divergent barrier: a thread returned while others of its block wait", Site());
    if (cluster().at_barrier > 0)
      fault("divergent barrier: a thread returned while others of its cluster wait", Site());
    if (warp().at_shuffle > 0) fault("divergent shuffle: a lane returned while others of its warp wait", Site());
  } catch (const Unwind&) {
  }
  threads_[current_].state = State::kReturned;
  ++warp().returned;
  release(&block().end_token);
  if (++block().returned == launch_.block) {
    acquire(&block().end_token);
    arenas[block().slot]->end_block();
  }
  release(&end_token_);
  Fiber::suspend();
}

void Grid::pause(State state, const Site& site) {
  threads_[current_].site = site;
  if (state == State::kReady) {
    make_ready(current_);
  } else {
    threads_[current_].state = state;
  }
  Fiber::suspend();
  if (!fault_.empty()) throw Unwind();
}

bool Grid::is_left_out(const Site& barrier) const {
  const size_t colon = launch_.without.find(':');
  return colon != std::string::npos && launch_.without.compare(0, colon, file_of(barrier)) == 0 &&
         std::strtoul(launch_.without.c_str() + colon + 1, nullptr, 10) == barrier.line();
}

void Grid::block_barrier(const Site& site) {
  if (is_left_out(site)) return;
  if (block().returned > 0) fault("divergent barrier: other threads of the block have returned", site);
  if (warp().at_shuffle > 0) fault("divergent shuffle: a lane is at a barrier while others of its warp wait", site);
  if (block().at_barrier > 0 && !same(block().site, site)) {
    fault("divergent barrier: others of the block wait at another one", site);
  }
  block().site = site;
  void* token = &block().token[block().phase % 2];
  release(token);
  ++warp().at_barrier;
  if (++block().at_barrier < launch_.block) {
    pause(State::kAtBarrier, site);
  } else {
    block().at_barrier = 0;
    ++block().phase;
    met(site);
    const size_t first = first_of_block();
    for (size_t i = first; i < first + launch_.block; ++i) {
      warps_[i / kWarp].at_barrier = 0;
      make_ready(i);
    }
    scheduler_.barrier_opened(first);
    pause(State::kReady, site);
  }
  acquire(token);
}

void Grid::met(const Site& barrier) {
  const auto is_it = [&](const Site& other) { return same(barrier, other); };
  if (std::none_of(barriers_.begin(), barriers_.end(), is_it)) barriers_.push_back(barrier);
}

void Grid::cluster_barrier(const Site& site) {
  if (is_left_out(site)) return;
  const unsigned blocks = launch_.cluster;
  const size_t first_block = block_index() / blocks * blocks;
  for (size_t i = first_block; i < first_block + blocks; ++i) {
    if (blocks_[i].returned > 0) fault("divergent barrier: other threads of the cluster have returned", site);
  }
  if (warp().at_shuffle > 0) fault("divergent shuffle: a lane is at a barrier while others of its warp wait", site);
  if (block().at_barrier > 0) fault("divergent barrier: others of the block wait at another one", site);
  if (cluster().at_barrier > 0 && !same(cluster().site, site)) {
    fault("divergent barrier: others of the cluster wait at another one", site);
  }
  cluster().site = site;
  void* token = &cluster().token[cluster().phase % 2];
  release(token);
  ++warp().at_barrier;
  if (++cluster().at_barrier < blocks * launch_.block) {
    pause(State::kAtCluster, site);
  } else {
    cluster().at_barrier = 0;
    ++cluster().phase;
    met(site);
    const size_t first = first_block * launch_.block;
    for (size_t i = first; i < first + size_t{blocks} * launch_.block; ++i) {
      warps_[i / kWarp].at_barrier = 0;
      make_ready(i);
    }
    scheduler_.barrier_opened(first_of_block());
    pause(State::kReady, site);
  }
  acquire(token);
}

const void* Grid::in_cta(const void* own, unsigned rank, const Site& site) {
  if (rank >= launch_.cluster) {
    fault("shared memory of block " + std::to_string(rank) + " of a cluster of " + std::to_string(launch_.cluster),
          site);
  }
  const size_t other = block_index() / launch_.cluster * launch_.cluster + rank;
  if (other == block_index()) return own;
  if (cluster().phase == 0) fault("shared memory of a block that may not have started", site);
  if (blocks_[other].returned > 0) fault("shared memory of a block that ends", site);
  const void* there = arenas[block().slot]->twin(own, *arenas[blocks_[other].slot]);
  if (there == nullptr) fault("an address in no array of shared memory, for that of another block", site);
  return there;
}

double Grid::shuffle_xor(double value, int mask, const Site& site) {
  if (mask <= 0 || mask >= static_cast<int>(kWarp)) fault("shuffle_xor by a mask of " + std::to_string(mask), site);
  if (warp().returned > 0) fault("divergent shuffle: another lane has returned", site);
  if (warp().at_barrier > 0) fault("divergent shuffle: another lane is at a barrier", site);
  if (warp().at_shuffle > 0 && !same(warp().site, site)) {
    fault("divergent shuffle: another lane waits at another one", site);
  }
  warp().site = site;
  const size_t first = first_of_warp();
  const size_t lane = current_ - first;
  const double* values = warp().values[warp().phase % 2];
  warp().values[warp().phase % 2][lane] = value;
  if (++warp().at_shuffle < kWarp) {
    pause(State::kAtShuffle, site);
  } else {
    warp().at_shuffle = 0;
    ++warp().phase;
    for (size_t i = first; i < first + kWarp; ++i) make_ready(i);
    pause(State::kReady, site);
  }
  return values[lane ^ static_cast<size_t>(mask)];
}

unsigned Grid::arrive(unsigned* counter, unsigned step, const Site& site) {
  auto* real = static_cast<unsigned*>(checked_write(counter, sizeof *counter, sizeof *counter, site));
  release(real);
  const unsigned before = *real;
  *real += step;
  pause(State::kReady, site);
  return before;
}

void Grid::wait_for_flip(const unsigned* counter, unsigned before, const Site& site) {
  Thread& thread = threads_[current_];
  thread.counter = static_cast<const unsigned*>(checked_read(counter, sizeof *counter, sizeof *counter, site));
  thread.before = before;
  waiting_.push_back(current_);
  pause(State::kWaiting, site);
  acquire(const_cast<unsigned*>(thread.counter));
}

void Grid::group_barrier(unsigned* counter, unsigned group_size, unsigned rank, const Site& site) {
  if (is_left_out(site)) return;
  block_barrier(site);
  if (position().thread == 0) {
    wait_for_flip(counter, arrive(counter, rank == 0 ? kTopBit - (group_size - 1) : 1, site), site);
  }
  block_barrier(site);
}

bool Grid::last_to_arrive(unsigned* counter, unsigned count, const Site& site) {
  auto* real = static_cast<unsigned*>(checked_write(counter, sizeof *counter, sizeof *counter, site));
  release(real);
  const unsigned before = *real;
  // PTX's atom.inc also wraps at any value above its bound, in which case no caller is the last.
  if (before > count - 1) {
    fault("last_to_arrive finds its counter at " + std::to_string(before) +
              ", above count - 1 = " + std::to_string(count - 1),
          site);
  }
  const bool last = before == count - 1;
  *real = last ? 0 : before + 1;
  pause(State::kReady, site);
  if (last) acquire(real);
  return last;
}

void Grid::expect_uniform(int64_t key, double value, const Site& site) {
  if (!launch_.without.empty()) return;  // A skipped barrier must be detected by races and results instead.
  const uint64_t bits = std::bit_cast<uint64_t>(value);
  const auto first = uniform_.try_emplace({site.file_name(), site.line(), key}, bits).first;
  if (first->second == bits) return;
  fault("blocks differ in a value of " + std::to_string(key) + ": " + std::to_string(value) + " here, " +
            std::to_string(std::bit_cast<double>(first->second)) + " before",
        site);
}

void* Grid::dynamic_shared(const Site& site) {
  static const char key = 0;
  return shared_array(&key, "dynamic", launch_.dynamic_bytes, site);
}

void* Grid::shared_array(const void* key, const char* name, size_t bytes, const Site& site) {
  SharedMemory& arena = *arenas[block().slot];
  if (void* array = arena.array(key, name, bytes)) return array;
  fault("too much shared memory: " + std::to_string(bytes) + " bytes for '" + name + "' on top of " +
            std::to_string(arena.used()) + ", of " + std::to_string(kSharedBytes + launch_.dynamic_bytes),
        site);
}

void Grid::fault(const std::string& what, const Site& site) {
  fault_ = what + "; block " + std::to_string(position().block) + " thread " + std::to_string(position().thread);
  if (site.line() != 0) fault_ += ", " + describe(site);
  if (what.starts_with("divergent barrier")) fault_ += where(first_of_block(), first_of_block() + launch_.block);
  if (what.starts_with("divergent shuffle")) fault_ += where(first_of_warp(), first_of_warp() + kWarp);
  throw Unwind();
}

}  // namespace simt
