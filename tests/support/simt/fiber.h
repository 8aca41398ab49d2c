// Fiber: a function with its own stack that is resumed and suspended explicitly. One fiber represents one GPU thread.
//
// Only the scheduler resumes a fiber, and a fiber suspends only to the scheduler, so there is one switch in each
// direction. The code informs AddressSanitizer which stack is in use. To ThreadSanitizer, every fiber is a separate
// thread, and a switch orders NOTHING: although fibers run one after the other, only the synchronisation that the
// engine announces through release() and acquire() orders their accesses. The sanitizers are called through weak
// symbols, so this file and the engine are compiled once, without instrumentation, and linked into every build.
#pragma once

#include <cstddef>

namespace simt {

class Fiber {
 public:
  // body must never return: it ends with a suspend() that is never resumed.
  explicit Fiber(void (*body)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Called by the scheduler: runs the fiber until it suspends.
  void resume();
  // Called by the running fiber: returns to the scheduler.
  static void suspend();

 private:
  static void entry();

  void (*body_)();
  char* stack_;
  void* stack_pointer_ = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* tsan_fiber_ = nullptr;  // ThreadSanitizer's
};

// Whether the race detector is linked in. If so, each thread of a launch needs a fiber that no other thread of that
// launch has used, because the detector assumes that the accesses of one fiber are in program order.
bool race_detector_present();

// Synchronisation for the race detector: everything before a release of a token happens before everything after a later
// acquire of that token. No-ops without the race detector.
void release(void* token);
void acquire(void* token);

// Addressability for AddressSanitizer. No-ops if it is not linked in.
void forbid_access(void* begin, size_t bytes);
void permit_access(void* begin, size_t bytes);

}  // namespace simt
