// Fiber: a function on a stack of its own, resumed and suspended by hand. One fiber stands for one GPU thread.
//
// Only the scheduler's context resumes, and a fiber only suspends back to it, so there is one switch in each direction.
// AddressSanitizer is told which stack is in use. ThreadSanitizer is told that every fiber is a thread of its own and that
// a switch orders NOTHING: two fibers' accesses are ordered only by the synchronisation that the engine announces through
// release() and acquire(), although they run one after the other. The sanitizers are reached through weak symbols, so this
// file and the engine are compiled once, uninstrumented, and linked into every build.
#pragma once

#include <cstddef>

namespace simt {

class Fiber {
 public:
  // body must never return: it ends by suspending for ever.
  explicit Fiber(void (*body)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // From the scheduler: runs the fiber until it suspends.
  void resume();
  // From the running fiber: back to the scheduler.
  static void suspend();

 private:
  static void entry();

  void (*body_)();
  char* stack_;
  void* stack_pointer_ = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* tsan_fiber_ = nullptr;  // ThreadSanitizer's
};

// True where the race detector is linked in. Each thread of a launch then needs a fiber that no other thread has used in
// that launch: the detector takes accesses of one fiber to be in program order.
bool race_detector_present();

// Synchronisation as the race detector sees it: what came before a release of a token happens before what comes after a
// later acquire of that token. Nothing where there is no race detector.
void release(void* token);
void acquire(void* token);

// Addressability as AddressSanitizer sees it. Nothing where it is not linked in.
void forbid_access(void* begin, size_t bytes);
void permit_access(void* begin, size_t bytes);

}  // namespace simt
