// Scheduler: selects which of the runnable threads runs next.
//
// Uniform selection explores little: it almost never makes ONE thread lag far behind all others, as it takes to expose
// a missing second barrier. A seeded schedule therefore usually has a laggard: a thread, a warp or a block that runs
// only when nothing else can. Once the laggard had to run, another one is drawn. Occasionally there is none for a
// while.
#pragma once

#include "simt/run_queue.h"

namespace simt {

enum class Schedule {
  kSeeded,    // drawn from the seed, with a changing laggard
  kInOrder,   // round-robin by rank
  kReverse,   // round-robin by descending rank
  kStallOne,  // drawn from the seed; the laggard is one block, also drawn, throughout the launch
};

class Scheduler {
 public:
  Scheduler(Schedule schedule, uint64_t seed, unsigned blocks, unsigned block, unsigned warp)
      : schedule_(schedule),
        threads_(size_t{blocks} * block),
        block_(block),
        warp_(warp),
        random_(seed),
        ready_(threads_),
        last_(schedule == Schedule::kReverse ? 0 : threads_ - 1) {
    if (schedule == Schedule::kStallOne) laggard_ = draw_range(block_, {0, threads_});
    if (schedule == Schedule::kSeeded) draw_laggard({0, threads_});
  }

  void make_ready(size_t thread) { ready_.insert(thread); }
  bool stuck() const { return ready_.empty(); }

  // Must not be called when stuck.
  size_t take() {
    switch (schedule_) {
      case Schedule::kInOrder:
        return last_ = ready_.take_above(last_);
      case Schedule::kReverse:
        return last_ = ready_.take_below(last_);
      default:
        break;
    }
    const size_t thread = ready_.take_random(random_, laggard_);
    const bool had_to = thread >= laggard_.first && thread < laggard_.end;
    if (schedule_ == Schedule::kSeeded && (had_to || --patience_ == 0)) draw_laggard({0, threads_});
    return thread;
  }

  // The threads of a block, from `first` on, have met at a barrier. A laggard among them can expose a missing next
  // barrier.
  void barrier_opened(size_t first) {
    if (schedule_ == Schedule::kSeeded && random_.below(4) == 0) draw_laggard({first, first + block_});
  }

  // The order in which blocks become resident is part of the schedule.
  size_t next_block(size_t left) {
    switch (schedule_) {
      case Schedule::kInOrder:
        return 0;
      case Schedule::kReverse:
        return left - 1;
      default:
        return random_.below(left);
    }
  }

 private:
  // A random aligned group of `size` threads in `within`.
  Range draw_range(size_t size, const Range& within) {
    const size_t first = within.first + random_.below((within.end - within.first) / size) * size;
    return {first, first + size};
  }

  // Draws no laggard, a thread, a warp or a block, for a random number of steps between a few and the whole launch.
  void draw_laggard(const Range& within) {
    const size_t sizes[] = {0, 1, warp_, block_};
    const size_t size = sizes[random_.below(4)];
    laggard_ = size == 0 ? Range{} : draw_range(size, within);
    patience_ = 1 + random_.below(threads_ << random_.below(8));
  }

  Schedule schedule_;
  size_t threads_, block_, warp_;
  Random random_;
  RunQueue ready_;
  size_t last_;
  Range laggard_;
  size_t patience_ = 0;  // steps until the next laggard is drawn
};

}  // namespace simt
