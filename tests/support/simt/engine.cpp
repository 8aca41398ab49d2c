#include "simt/engine.h"

#include <algorithm>
#include <numeric>

#include "simt/grid.h"

namespace simt {

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<std::unique_ptr<SharedMemory>> arenas;

namespace {

constexpr size_t kMaxBarriers = 256;  // in one kernel's source

// Describes the CTAs that a group barrier still waits for, by its counter: rank 0 raises it from a small value to just
// below the top bit.
std::string missing(unsigned counter) {
  const unsigned count = counter % kTopBit;
  return count < kTopBit / 2 ? "rank 0 of a group" : std::to_string(kTopBit - count) + " more of a group";
}

Grid* grid = nullptr;  // the running grid

}  // namespace

// ---- in the scheduler's context -------------------------------------------------------------------------------------

Report Grid::run() {
  // Threads allocate nothing: to the race detector, memory belongs to the thread that allocates it.
  waiting_.reserve(threads_.size());
  barriers_.reserve(kMaxBarriers);
  std::vector<size_t> to_start(clusters_.size());
  std::iota(to_start.begin(), to_start.end(), size_t{0});
  std::vector<size_t> free_slots(launch_.resident_blocks == 0 ? launch_.grid
                                                              : std::min(launch_.resident_blocks, launch_.grid));
  std::iota(free_slots.rbegin(), free_slots.rend(), size_t{0});
  const auto start_what_fits = [&] {
    while (!to_start.empty() && free_slots.size() >= launch_.cluster) {
      const size_t choice = scheduler_.next_block(to_start.size());
      for (size_t rank = 0; rank < launch_.cluster; ++rank) {
        start_block(to_start[choice] * launch_.cluster + rank, free_slots.back());
        free_slots.pop_back();
      }
      to_start.erase(to_start.begin() + static_cast<std::ptrdiff_t>(choice));
    }
  };

  start_what_fits();
  for (size_t ended = 0; ended < blocks_.size();) {
    wake_waiting();
    if (scheduler_.stuck()) {
      fault_ = "deadlock: no thread can move" + where(0, threads_.size());
      break;
    }
    current_ = scheduler_.take();
    step();
    if (!fault_.empty()) break;
    if (block().returned < launch_.block) continue;
    ++ended;
    if (const char* name = arenas[block().slot]->overrun()) {
      fault_ = "shared memory written outside '" + std::string(name) + "'; block " + std::to_string(position().block);
      break;
    }
    free_slots.push_back(block().slot);
    start_what_fits();
  }
  if (!fault_.empty()) unwind();
  acquire(&end_token_);
  Report report{fault_, take_traffic(), switches_, {}};
  for (const Site& barrier : barriers_) report.barriers.insert(describe(barrier));
  return report;
}

void Grid::start_block(size_t rank, size_t slot) {
  // The race detector needs threads that share no fiber and no arena. Without it, those of a completed block are
  // reused.
  if (race_detector_present()) slot = rank;
  blocks_[rank].slot = slot;
  while (arenas.size() <= slot) arenas.push_back(std::make_unique<SharedMemory>(kSharedBytes + kMaxDynamicBytes));
  arenas[slot]->start_block(kSharedBytes + launch_.dynamic_bytes);
  for (unsigned i = 0; i < launch_.block; ++i) {
    const size_t index = rank * launch_.block + i;
    Thread& thread = threads_[index];
    thread.position = {i, launch_.block, static_cast<unsigned>(launch_.first_block + rank),
                       static_cast<unsigned>(launch_.of_blocks == 0 ? launch_.grid : launch_.of_blocks)};
    thread.fiber = slot * launch_.block + i;
    while (fibers.size() <= thread.fiber) {
      fibers.push_back(std::make_unique<Fiber>([] {
        for (;;) grid->run_thread();
      }));
    }
    scheduler_.make_ready(index);
  }
  release(&start_token_);
}

void Grid::step() {
  ++switches_;
  threads_[current_].started = true;
  fibers[threads_[current_].fiber]->resume();
}

// Lets the exception propagate through every thread that is inside the kernel.
void Grid::unwind() {
  for (current_ = 0; current_ < threads_.size(); ++current_) {
    if (threads_[current_].started && threads_[current_].state != State::kReturned) step();
  }
}

void Grid::wake_waiting() {
  for (size_t i = waiting_.size(); i-- > 0;) {
    const Thread& thread = threads_[waiting_[i]];
    if (!flipped(*thread.counter, thread.before)) continue;
    make_ready(waiting_[i]);
    waiting_[i] = waiting_.back();
    waiting_.pop_back();
  }
}

void Grid::make_ready(size_t thread) {
  threads_[thread].state = State::kReady;
  scheduler_.make_ready(thread);
}

// Describes the threads that do not run: one line for each range of threads that wait at the same place.
std::string Grid::where(size_t first, size_t end) const {
  const auto place = [](const Thread& thread) -> std::string {
    switch (thread.state) {
      case State::kReady:
        return "";
      case State::kReturned:
        return "returned";
      case State::kAtBarrier:
        return "at block_barrier, " + describe(thread.site);
      case State::kAtCluster:
        return "at cluster_barrier, " + describe(thread.site);
      case State::kAtShuffle:
        return "at shuffle_xor, " + describe(thread.site);
      case State::kWaiting:
        break;
    }
    return "waiting for " + missing(*thread.counter) + ", " + describe(thread.site);
  };
  std::string text;
  int lines = 0;
  for (size_t i = first; i < end;) {
    const std::string here = place(threads_[i]);
    size_t next = i + 1;
    while (next < end && next % launch_.block != 0 && place(threads_[next]) == here) ++next;
    if (!here.empty() && lines++ < 40) {
      text += "\n  block " + std::to_string(i / launch_.block) + " thread " + std::to_string(i % launch_.block);
      if (next - i > 1) text += ".." + std::to_string((next - 1) % launch_.block);
      text += ": " + here;
    }
    i = next;
  }
  return lines > 40 ? text + "\n  and " + std::to_string(lines - 40) + " lines more" : text;
}

// ---- entry points ---------------------------------------------------------------------------------------------------

Report launch(const Launch& configuration, void (*kernel)(void*), void* argument) {
  const unsigned block = configuration.block;
  const unsigned cluster = configuration.cluster;
  const size_t dynamic = configuration.dynamic_bytes;
  const unsigned resident = configuration.resident_blocks == 0 ? configuration.grid : configuration.resident_blocks;
  const bool clusters_fit = cluster > 0 && cluster <= kMaxCluster && cluster <= resident &&
                            configuration.grid % cluster == 0 && configuration.first_block % cluster == 0;
  if (configuration.grid == 0 || block == 0 || block % kWarp != 0 || block > kMaxBlock || !clusters_fit ||
      dynamic > kMaxDynamicBytes) {
    Report report;
    report.fault = "invalid launch: grid " + std::to_string(configuration.grid) + ", " + std::to_string(resident) +
                   " of it at a time, clusters of " + std::to_string(cluster) + ", block " + std::to_string(block) +
                   ", " + std::to_string(dynamic) + " bytes of dynamic shared memory";
    return report;
  }
  const auto one = std::make_unique<Grid>(configuration, kernel, argument);
  grid = one.get();
  return one->run();
}

size_t Report::read(const std::string& buffer) const {
  const auto entry = std::find_if(traffic.begin(), traffic.end(), [&](const Traffic& t) { return t.buffer == buffer; });
  return entry == traffic.end() ? 0 : entry->bytes_read;
}

size_t Report::written(const std::string& buffer) const {
  const auto entry = std::find_if(traffic.begin(), traffic.end(), [&](const Traffic& t) { return t.buffer == buffer; });
  return entry == traffic.end() ? 0 : entry->bytes_written;
}

const Position& position() { return grid->position(); }
void block_barrier(const Site& site) { grid->block_barrier(site); }
void cluster_barrier(const Site& site) { grid->cluster_barrier(site); }
const void* in_cta(const void* own, unsigned rank, const Site& site) { return grid->in_cta(own, rank, site); }
double shuffle_xor(double value, int mask, const Site& site) { return grid->shuffle_xor(value, mask, site); }
unsigned arrive(unsigned* counter, unsigned step, const Site& site) { return grid->arrive(counter, step, site); }
void wait_for_flip(const unsigned* counter, unsigned before, const Site& site) {
  grid->wait_for_flip(counter, before, site);
}
void group_barrier(unsigned* counter, unsigned group_size, unsigned rank, const Site& site) {
  grid->group_barrier(counter, group_size, rank, site);
}
bool last_to_arrive(unsigned* counter, unsigned count, const Site& site) {
  return grid->last_to_arrive(counter, count, site);
}
void expect_uniform(int64_t key, double value, const Site& site) { grid->expect_uniform(key, value, site); }
void* dynamic_shared(const Site& site) { return grid->dynamic_shared(site); }
void* shared_array(const void* key, const char* name, size_t bytes, const Site& site) {
  return grid->shared_array(key, name, bytes, site);
}
void fault(const std::string& what, const Site& site) { grid->fault(what, site); }

}  // namespace simt
