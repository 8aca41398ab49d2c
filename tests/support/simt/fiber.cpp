#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

// Assembly on x86-64. Elsewhere, or with SIMT_UCONTEXT: ucontext, which is portable and slow.
#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_ASSEMBLY 1
#else
#include <ucontext.h>
#endif

extern "C" {
#define SIMT_WEAK __attribute__((weak))
SIMT_WEAK void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
SIMT_WEAK void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, size_t* size_old);
SIMT_WEAK void __asan_poison_memory_region(const volatile void* begin, size_t bytes);
SIMT_WEAK void __asan_unpoison_memory_region(const volatile void* begin, size_t bytes);
SIMT_WEAK void* __tsan_get_current_fiber();
SIMT_WEAK void* __tsan_create_fiber(unsigned flags);
SIMT_WEAK void __tsan_destroy_fiber(void* fiber);
SIMT_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
SIMT_WEAK void __tsan_acquire(void* address);
SIMT_WEAK void __tsan_release(void* address);
#undef SIMT_WEAK
}

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 * 1024;  // address space; the sanitizers print their reports on it
// A stack with a guard page takes two mappings, of the 65530 that Linux allows a process by default. Stacks without one
// are merged into one mapping.
constexpr size_t kGuardedStacks = 16 * 1024;
constexpr unsigned kSwitchWithoutSync = 1;  // __tsan_switch_to_fiber_no_sync

size_t live_stacks = 0;

struct Scheduler {
  void* stack_pointer = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  void* tsan_fiber = nullptr;
} scheduler;

Fiber* running = nullptr;

#if defined(SIMT_ASSEMBLY)
// Saves the callee-saved registers on the current stack, stores its stack pointer in *from, and continues on the stack
// `to`. (swapcontext() does the same with a system call for the signal mask, which is an order of magnitude slower.)
extern "C" void simt_switch_stack(void** from, void* to);
asm(R"(
.text
.globl simt_switch_stack
.hidden simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack, .-simt_switch_stack
)");

// Prepares a stack that simt_switch_stack() can continue on: six registers, then the return address. entry is reached
// by `ret` instead of `call`, so 8 more bytes provide the alignment that the ABI requires at a function's first
// instruction.
void* new_stack_pointer(char* stack, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t*>(stack + kStackBytes);
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  return top;
}
#else
void simt_switch_stack(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

void* new_stack_pointer(char* stack, void (*entry)()) {
  auto* context = reinterpret_cast<ucontext_t*>(stack);  // the stack grows down towards it from the other end
  getcontext(context);
  context->uc_stack.ss_sp = stack + sizeof(ucontext_t);
  context->uc_stack.ss_size = kStackBytes - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}
#endif

char* new_stack() {
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* pages = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (pages == MAP_FAILED || (live_stacks < kGuardedStacks && mprotect(pages, guard, PROT_NONE) != 0)) {
    std::perror("simt: no memory for a fiber's stack");
    std::abort();
  }
  ++live_stacks;
  return static_cast<char*>(pages) + guard;
}

void delete_stack(char* stack) {
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  permit_access(stack, kStackBytes);  // an abandoned fiber leaves the red zones of its frames behind
  munmap(stack - guard, guard + kStackBytes);
  --live_stacks;
}

}  // namespace

Fiber::Fiber(void (*body)()) : body_(body), stack_(new_stack()) {
  stack_pointer_ = new_stack_pointer(stack_, &Fiber::entry);
  if (__tsan_create_fiber) tsan_fiber_ = __tsan_create_fiber(0);
}

Fiber::~Fiber() {
  if (tsan_fiber_) __tsan_destroy_fiber(tsan_fiber_);
  delete_stack(stack_);
}

void Fiber::entry() {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack_bottom, &scheduler.stack_bytes);
  }
  running->body_();
  std::abort();
}

void Fiber::resume() {
  running = this;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&scheduler.fake_stack, stack_, kStackBytes);
  if (tsan_fiber_) {
    scheduler.tsan_fiber = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_fiber_, kSwitchWithoutSync);
  }
  simt_switch_stack(&scheduler.stack_pointer, stack_pointer_);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
}

void Fiber::suspend() {
  Fiber* self = running;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&self->fake_stack_, scheduler.stack_bottom, scheduler.stack_bytes);
  }
  if (self->tsan_fiber_) __tsan_switch_to_fiber(scheduler.tsan_fiber, kSwitchWithoutSync);
  simt_switch_stack(&self->stack_pointer_, scheduler.stack_pointer);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(self->fake_stack_, &scheduler.stack_bottom, &scheduler.stack_bytes);
  }
}

bool race_detector_present() { return __tsan_create_fiber != nullptr; }

void release(void* token) {
  if (__tsan_release) __tsan_release(token);
}

void acquire(void* token) {
  if (__tsan_acquire) __tsan_acquire(token);
}

void forbid_access(void* begin, size_t bytes) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(begin, bytes);
}

void permit_access(void* begin, size_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(begin, bytes);
}

}  // namespace simt
