// Scheduler: which of the threads that can run goes next.
//
// Drawing every thread alike explores little: that ONE thread lags far behind all others, which is what it takes to show a
// missing second barrier, then almost never happens. So a seeded schedule always has a laggard: a thread, a warp or a block
// that moves only when nothing else can. Once it had to be moved, another is drawn. Now and then there is none for a while.
#pragma once

#include "simt/run_queue.h"

namespace simt {

enum class Schedule {
  kSeeded,    // drawn from the seed, with a changing laggard
  kInOrder,   // round and round by rank
  kReverse,   // the same from the other end
  kStallOne,  // drawn from the seed; one block, drawn too, is the laggard all the time
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
    if (schedule == Schedule::kStallOne) laggard_ = draw_range(block_);
    if (schedule == Schedule::kSeeded) draw_laggard();
  }

  void make_ready(size_t thread) { ready_.insert(thread); }
  bool stuck() const { return ready_.empty(); }

  // Not when stuck.
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
    if (schedule_ == Schedule::kSeeded && (had_to || --patience_ == 0)) draw_laggard();
    return thread;
  }

  // In which order blocks become resident is part of the schedule.
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
  Range draw_range(size_t size) {
    const size_t first = random_.below(threads_ / size) * size;
    return {first, first + size};
  }

  void draw_laggard() {
    patience_ = ~size_t{0};
    switch (random_.below(4)) {
      case 0:
        laggard_ = draw_range(1);
        break;
      case 1:
        laggard_ = draw_range(warp_);
        break;
      case 2:
        laggard_ = draw_range(block_);
        break;
      default:
        laggard_ = {};
        patience_ = 1 + random_.below(4 * threads_);
    }
  }

  Schedule schedule_;
  size_t threads_, block_, warp_;
  Random random_;
  RunQueue ready_;
  size_t last_;
  Range laggard_;
  size_t patience_ = ~size_t{0};  // steps until a laggard that need not move, or none, is drawn anew
};

}  // namespace simt
