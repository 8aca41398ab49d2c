// Injects allocation failures. Loaded before all other libraries (LD_PRELOAD), and controlled from Python through
// ctypes.
//
// Counts, and makes fail, the allocations of a call of the extension: operator new and mmap when the caller is the
// extension itself, and posix_memalign, with which torch allocates the data of CPU tensors. All other allocations pass:
// handling failed allocations of torch's own objects is up to torch.
#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

std::atomic<bool> counting{false};
std::atomic<long> seen{0};
std::atomic<long> failing{-1};

bool fails() { return seen.fetch_add(1) == failing.load(); }

// Whether the code at this address belongs to the extension.
bool is_of_extension(void* code) {
  Dl_info info;
  if (dladdr(code, &info) == 0 || info.dli_fname == nullptr) return false;
  const char* name = std::strrchr(info.dli_fname, '/');
  return name != nullptr && std::strncmp(name, "/_C.", 4) == 0;
}

template <typename Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

void* allocate(std::size_t bytes, void* caller) {
  if (counting.load() && is_of_extension(caller) && fails()) return nullptr;
  return std::malloc(bytes == 0 ? 1 : bytes);
}

void* allocate_or_throw(std::size_t bytes, void* caller) {
  void* memory = allocate(bytes, caller);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

// Starts counting. The allocation with this number fails, counted from 0; none if the number is negative.
extern "C" void start_counting(long number) {
  seen = 0;
  failing = number;
  counting = true;
}

// Stops counting and returns the number of allocations.
extern "C" long stop_counting() {
  counting = false;
  return seen;
}

void* operator new(std::size_t bytes) { return allocate_or_throw(bytes, __builtin_return_address(0)); }
void* operator new[](std::size_t bytes) { return allocate_or_throw(bytes, __builtin_return_address(0)); }
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return allocate(bytes, __builtin_return_address(0));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }

extern "C" int posix_memalign(void** memory, std::size_t alignment, std::size_t bytes) {
  static const auto real = next<int(void**, std::size_t, std::size_t)>("posix_memalign");
  return counting.load() && fails() ? ENOMEM : real(memory, alignment, bytes);
}

extern "C" void* mmap(void* address, std::size_t bytes, int protection, int flags, int file, off_t offset) {
  static const auto real = next<void*(void*, std::size_t, int, int, int, off_t)>("mmap");
  if (counting.load() && is_of_extension(__builtin_return_address(0)) && fails()) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  return real(address, bytes, protection, flags, file, offset);
}
