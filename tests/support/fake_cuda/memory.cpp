#include "fake_cuda/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "fake_cuda/state.h"
#include "simt/buffers.h"
#include "simt/engine.h"

namespace fake_cuda {
namespace {

struct Allocation {
  uintptr_t start;
  size_t bytes;
  int device;
};

// By start address. Never destroyed, since threads of torch end after the destruction of static objects.
std::map<uintptr_t, Allocation>& allocations = *new std::map<uintptr_t, Allocation>;
std::map<uintptr_t, size_t>& pinned = *new std::map<uintptr_t, size_t>;
size_t bytes_of_device[kDevices];

// Cache: the allocation that the running kernel accessed last, which it is likely to access again.
Allocation recent{0, 0, -1};
int kernel_device = -1;
size_t bytes_read, bytes_written;

size_t whole_pages(size_t bytes) {
  static const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

// A guard page follows each allocation.
size_t mapped(size_t bytes) { return whole_pages(bytes) + whole_pages(1); }

const Allocation* find(uintptr_t address, size_t bytes) {
  auto after = allocations.upper_bound(address);
  if (after == allocations.begin()) return nullptr;
  const Allocation& allocation = (--after)->second;
  const size_t offset = address - allocation.start;
  return offset < allocation.bytes && bytes <= allocation.bytes - offset ? &allocation : nullptr;
}

Allocation allocation_of(uintptr_t address, size_t bytes) {
  const auto guard = lock();
  const Allocation* found = find(address, bytes);
  return found == nullptr ? Allocation{0, 0, -1} : *found;
}

void check(const char* verb, uintptr_t address, size_t bytes, size_t alignment, const simt::Site& site) {
  const bool again = address >= recent.start && address - recent.start < recent.bytes &&
                     bytes <= recent.bytes - (address - recent.start);
  const Allocation allocation = again ? recent : allocation_of(address, bytes);
  if (allocation.device == kernel_device && address % alignment == 0) {
    recent = allocation;
    return;
  }
  char text[160];
  const auto* where = reinterpret_cast<const void*>(address);
  if (allocation.device < 0) {
    std::snprintf(text, sizeof text, "%s of %zu bytes at %p, which is in no allocation of a device", verb, bytes,
                  where);
  } else if (allocation.device != kernel_device) {
    std::snprintf(text, sizeof text, "%s of %zu bytes of device %d by a kernel of device %d", verb, bytes,
                  allocation.device, kernel_device);
  } else {
    std::snprintf(text, sizeof text, "misaligned: %s of %zu bytes at %p", verb, bytes, where);
  }
  simt::fault(text, site);
}

}  // namespace

void* allocate(int device, size_t bytes) {
  void* memory = mmap(nullptr, mapped(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  mprotect(static_cast<char*>(memory) + whole_pages(bytes), whole_pages(1), PROT_NONE);
  std::memset(memory, simt::kPoison, bytes);
  const auto guard = lock();
  const auto start = reinterpret_cast<uintptr_t>(memory);
  allocations[start] = {start, bytes, device};
  bytes_of_device[device] += bytes;
  return memory;
}

bool deallocate(void* memory) {
  const auto guard = lock();
  const auto found = allocations.find(reinterpret_cast<uintptr_t>(memory));
  if (found == allocations.end()) return false;
  bytes_of_device[found->second.device] -= found->second.bytes;
  munmap(memory, mapped(found->second.bytes));
  allocations.erase(found);
  recent = {0, 0, -1};
  return true;
}

int device_of(const void* memory, size_t bytes) {
  const auto guard = lock();
  const Allocation* allocation = find(reinterpret_cast<uintptr_t>(memory), bytes);
  return allocation == nullptr ? -1 : allocation->device;
}

size_t allocated(int device) {
  const auto guard = lock();
  return bytes_of_device[device];
}

void* allocate_pinned(size_t bytes) {
  void* memory = std::malloc(bytes);
  if (memory != nullptr) register_pinned(memory, bytes);
  return memory;
}

bool deallocate_pinned(void* memory) {
  if (!unregister_pinned(memory)) return false;
  std::free(memory);
  return true;
}

void register_pinned(void* memory, size_t bytes) {
  const auto guard = lock();
  pinned[reinterpret_cast<uintptr_t>(memory)] = bytes;
}

bool unregister_pinned(void* memory) {
  const auto guard = lock();
  return pinned.erase(reinterpret_cast<uintptr_t>(memory)) == 1;
}

bool is_pinned(const void* memory) {
  const auto guard = lock();
  const auto address = reinterpret_cast<uintptr_t>(memory);
  auto after = pinned.upper_bound(address);
  return after != pinned.begin() && address - std::prev(after)->first < std::prev(after)->second;
}

void enter_kernel(int device) {
  recent = {0, 0, -1};
  kernel_device = device;
}

}  // namespace fake_cuda

// ---- called by the engine and the primitives, declared in simt/buffers.h --------------------------------------------

namespace simt {

const void* checked_read(const void* address, size_t bytes, size_t alignment, const Site& site) {
  fake_cuda::check("read", reinterpret_cast<uintptr_t>(address), bytes, alignment, site);
  fake_cuda::bytes_read += bytes;
  return address;
}

void* checked_write(void* address, size_t bytes, size_t alignment, const Site& site) {
  fake_cuda::check("write", reinterpret_cast<uintptr_t>(address), bytes, alignment, site);
  fake_cuda::bytes_written += bytes;
  return address;
}

std::vector<Traffic> take_traffic() {
  const Traffic all{"device", fake_cuda::bytes_read, fake_cuda::bytes_written};
  fake_cuda::bytes_read = fake_cuda::bytes_written = 0;
  return {all};
}

}  // namespace simt
