#include "simt/engine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "simt/fiber.h"
#include "simt/shared_memory.h"

namespace simt {
namespace {

enum class State { kReady, kAtBarrier, kAtShuffle, kWaiting, kReturned };

struct Thread {
  Position position;
  size_t fiber;
  bool started = false;
  State state = State::kReady;
  Site site;                          // of the call that it waits in
  const unsigned* counter = nullptr;  // whose top bit it waits to flip ...
  unsigned before = 0;                // ... from what it is here
};

struct Block {
  size_t slot = 0;
  unsigned at_barrier = 0;
  unsigned returned = 0;
  // Barriers use two tokens in turn. With one, a thread that is already at the next barrier would hand its newer accesses
  // to those that have not yet left this one, and their races would pass for ordered.
  unsigned phase = 0;
  char token[2];
  Site site;  // of the barrier that those at_barrier wait at
};

struct Warp {
  unsigned at_shuffle = 0;
  unsigned at_barrier = 0;
  unsigned returned = 0;
  unsigned phase = 0;
  Site site;                // of the shuffle that those at_shuffle wait at
  double values[2][kWarp];  // in turn: one shuffle's values are still read while the next one's are offered
};

constexpr size_t kMaxBarriers = 256;  // in the source of one kernel

constexpr unsigned kTopBit = 0x80000000u;
bool flipped(unsigned now, unsigned before) { return ((now ^ before) & kTopBit) != 0; }

// Thrown through the kernel's frames when the launch has ended in a fault.
struct Unwind {};

// These outlive launches: making them costs more than a small launch does.
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<std::unique_ptr<SharedMemory>> arenas;

// Who a group's barrier still waits for, by its counter: rank 0 takes it from few to just below its top bit.
std::string missing(unsigned counter) {
  const unsigned count = counter % kTopBit;
  return count < kTopBit / 2 ? "rank 0 of a group" : std::to_string(kTopBit - count) + " more of a group";
}

class Grid;
Grid* grid = nullptr;  // the one that runs

const char* file_of(const Site& site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return slash ? slash + 1 : site.file_name();
}

std::string describe(const Site& site) { return std::string(file_of(site)) + ":" + std::to_string(site.line()); }

bool same(const Site& a, const Site& b) {
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
        warps_(threads_.size() / kWarp) {}

  Report run();
  void run_thread();

  const Position& position() const { return threads_[current_].position; }
  void block_barrier(const Site& site);
  double shuffle_xor(double value, int mask, const Site& site);
  unsigned arrive(unsigned* counter, unsigned step, const Site& site);
  void wait_for_flip(const unsigned* counter, unsigned before, const Site& site);
  void group_barrier(unsigned* counter, unsigned members, unsigned rank, const Site& site);
  bool last_to_arrive(unsigned* counter, unsigned count, const Site& site);
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
  bool is_left_out(const Site& barrier) const;
  std::string where(size_t first, size_t end) const;

  Block& block() { return blocks_[current_ / launch_.block]; }
  Warp& warp() { return warps_[current_ / kWarp]; }
  size_t first_of_block() const { return current_ / launch_.block * launch_.block; }
  size_t first_of_warp() const { return current_ / kWarp * kWarp; }

  const Launch launch_;
  void (*const kernel_)(void*);
  void* const argument_;
  Scheduler scheduler_;
  std::vector<Thread> threads_;
  std::vector<Block> blocks_;
  std::vector<Warp> warps_;
  std::vector<size_t> waiting_;  // threads, for a counter
  size_t current_ = 0;
  size_t switches_ = 0;
  std::vector<Site> barriers_;  // met
  std::string fault_;
  char start_token_, end_token_;
};

// ---- in the scheduler's context -------------------------------------------------------------------------------------

Report Grid::run() {
  // Threads allocate nothing: the race detector takes memory to be its allocating thread's.
  waiting_.reserve(threads_.size());
  barriers_.reserve(kMaxBarriers);
  std::vector<size_t> to_start(launch_.grid);
  std::iota(to_start.begin(), to_start.end(), size_t{0});
  const auto start_one = [&](size_t slot) {
    const size_t choice = scheduler_.next_block(to_start.size());
    start_block(to_start[choice], slot);
    to_start.erase(to_start.begin() + static_cast<std::ptrdiff_t>(choice));
  };

  const size_t resident = launch_.resident_blocks == 0 ? launch_.grid : std::min(launch_.resident_blocks, launch_.grid);
  for (size_t slot = 0; slot < resident; ++slot) start_one(slot);
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
      fault_ = "shared memory written beside '" + std::string(name) + "'; block " + std::to_string(position().block);
      break;
    }
    if (!to_start.empty()) start_one(block().slot);
  }
  if (!fault_.empty()) unwind();
  acquire(&end_token_);
  Report report{fault_, take_traffic(), switches_, {}};
  for (const Site& barrier : barriers_) report.barriers.insert(describe(barrier));
  return report;
}

void Grid::start_block(size_t rank, size_t slot) {
  // The race detector needs threads that share no fiber and no arena; without it, those of an ended block are used again.
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

// Lets the exception pass through every thread that is in the middle of the kernel.
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

// Who is not running, and where: a line for each run of threads in one place.
std::string Grid::where(size_t first, size_t end) const {
  const auto place = [](const Thread& thread) -> std::string {
    switch (thread.state) {
      case State::kReady:
        return "";
      case State::kReturned:
        return "returned";
      case State::kAtBarrier:
        return "at block_barrier, " + describe(thread.site);
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

// ---- in a thread's context ------------------------------------------------------------------------------------------

void Grid::run_thread() {
  acquire(&start_token_);
  try {
    kernel_(argument_);
    if (block().at_barrier > 0) fault("divergent barrier: a thread returned while others of its block wait", Site());
    if (warp().at_shuffle > 0) fault("divergent shuffle: a lane returned while others of its warp wait", Site());
  } catch (const Unwind&) {
  }
  threads_[current_].state = State::kReturned;
  ++block().returned;
  ++warp().returned;
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
    const auto met = [&](const Site& other) { return same(site, other); };
    if (std::none_of(barriers_.begin(), barriers_.end(), met)) barriers_.push_back(site);
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

void Grid::group_barrier(unsigned* counter, unsigned members, unsigned rank, const Site& site) {
  if (is_left_out(site)) return;
  block_barrier(site);
  if (position().thread == 0) {
    wait_for_flip(counter, arrive(counter, rank == 0 ? kTopBit - (members - 1) : 1, site), site);
  }
  block_barrier(site);
}

bool Grid::last_to_arrive(unsigned* counter, unsigned count, const Site& site) {
  auto* real = static_cast<unsigned*>(checked_write(counter, sizeof *counter, sizeof *counter, site));
  release(real);
  const bool last = *real >= count - 1;
  *real = last ? 0 : *real + 1;
  pause(State::kReady, site);
  if (last) acquire(real);
  return last;
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

}  // namespace

// ---- the doors ------------------------------------------------------------------------------------------------------

Report launch(const Launch& configuration, void (*kernel)(void*), void* argument) {
  const unsigned block = configuration.block;
  const size_t dynamic = configuration.dynamic_bytes;
  if (configuration.grid == 0 || block == 0 || block % kWarp != 0 || block > kMaxBlock || dynamic > kMaxDynamicBytes) {
    Report report;
    report.fault = "invalid launch: grid " + std::to_string(configuration.grid) + ", block " + std::to_string(block) +
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
double shuffle_xor(double value, int mask, const Site& site) { return grid->shuffle_xor(value, mask, site); }
unsigned arrive(unsigned* counter, unsigned step, const Site& site) { return grid->arrive(counter, step, site); }
void wait_for_flip(const unsigned* counter, unsigned before, const Site& site) {
  grid->wait_for_flip(counter, before, site);
}
void group_barrier(unsigned* counter, unsigned members, unsigned rank, const Site& site) {
  grid->group_barrier(counter, members, rank, site);
}
bool last_to_arrive(unsigned* counter, unsigned count, const Site& site) {
  return grid->last_to_arrive(counter, count, site);
}
void* dynamic_shared(const Site& site) { return grid->dynamic_shared(site); }
void* shared_array(const void* key, const char* name, size_t bytes, const Site& site) {
  return grid->shared_array(key, name, bytes, site);
}
void fault(const std::string& what, const Site& site) { grid->fault(what, site); }

}  // namespace simt
