#include "simt/buffers.h"

#include <sys/mman.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "simt/engine.h"

namespace simt {

// One range of device addresses per buffer. A buffer starts in the middle of its range, so that a negative index stays
// in the range too.
struct Memory {
  // Bit 55 is never set in a mapped address (on x86-64 such an address is not even canonical).
  static constexpr uintptr_t kBase = uintptr_t{1} << 55;
  static constexpr int kWindowBits = 40;
  static constexpr size_t kAccesses = 128;
  static constexpr size_t kStorageAlignment = 256;

  static inline std::array<Buffer*, kAccesses> windows{};

  static uintptr_t add(Buffer* buffer) {
    for (size_t window = 0; window < kAccesses; ++window) {
      if (windows[window]) continue;
      windows[window] = buffer;
      return kBase + (uintptr_t{window} << kWindowBits) + (uintptr_t{1} << (kWindowBits - 1)) + buffer->misalignment_;
    }
    std::fprintf(stderr, "simt: more than %zu buffers\n", kAccesses);
    std::abort();
  }

  static void remove(const Buffer* buffer) {
    for (Buffer*& window : windows) {
      if (window == buffer) window = nullptr;
    }
  }

  static Buffer* of(uintptr_t address) {
    if (address < kBase) return nullptr;
    const uintptr_t window = (address - kBase) >> kWindowBits;
    return window < kAccesses ? windows[window] : nullptr;
  }

  static char* check(const char* verb, uintptr_t address, size_t bytes, size_t alignment, const Site& site) {
    Buffer* buffer = of(address);
    if (!buffer) {
      char text[128];
      std::snprintf(text, sizeof text, "%s of %zu bytes at 0x%zx, which is in no buffer", verb, bytes,
                    static_cast<size_t>(address));
      fault(text, site);
    }
    const auto offset = static_cast<std::ptrdiff_t>(address - buffer->device_address_);
    const bool inside = offset >= 0 && static_cast<size_t>(offset) <= buffer->bytes_ &&
                        bytes <= buffer->bytes_ - static_cast<size_t>(offset);
    if (!inside || address % alignment != 0) {
      char text[256];
      if (!inside) {
        std::snprintf(text, sizeof text, "out of bounds: %s of %zu bytes at byte %td of '%s', which has %zu", verb,
                      bytes, offset, buffer->name_.c_str(), buffer->bytes_);
      } else {
        std::snprintf(text, sizeof text, "misaligned: %s of %zu bytes at byte %td of '%s', %zu past a multiple of %zu",
                      verb, bytes, offset, buffer->name_.c_str(), static_cast<size_t>(address % alignment), alignment);
      }
      fault(text, site);
    }
    (verb[0] == 'r' ? buffer->bytes_read_ : buffer->bytes_written_) += bytes;
    return buffer->host_ + offset;
  }

  static std::vector<Traffic> take_traffic() {
    std::vector<Traffic> traffic;
    for (Buffer* buffer : windows) {
      if (!buffer) continue;
      traffic.push_back({buffer->name_, buffer->bytes_read_, buffer->bytes_written_});
      buffer->bytes_read_ = buffer->bytes_written_ = 0;
    }
    return traffic;
  }

  // A separate heap block that ends where the buffer ends, so that AddressSanitizer detects an overrun of a single
  // byte.
  static char* allocate(const Buffer& buffer) {
    const size_t bytes = buffer.misalignment_ + buffer.bytes_;
    if (buffer.storage_ == Buffer::Storage::kSparse) {
      void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (pages == MAP_FAILED) throw std::bad_alloc();
      return static_cast<char*>(pages) + buffer.misalignment_;
    }
    return static_cast<char*>(::operator new(bytes, std::align_val_t{kStorageAlignment})) + buffer.misalignment_;
  }

  static void deallocate(const Buffer& buffer) {
    if (buffer.storage_ == Buffer::Storage::kSparse) {
      munmap(buffer.host_ - buffer.misalignment_, buffer.misalignment_ + buffer.bytes_);
      return;
    }
    ::operator delete(buffer.host_ - buffer.misalignment_, std::align_val_t{kStorageAlignment});
  }
};

Buffer::Buffer(std::string name, size_t bytes, size_t misalignment, Storage storage)
    : name_(std::move(name)), bytes_(bytes), misalignment_(misalignment), storage_(storage) {
  device_address_ = Memory::add(this);
  host_ = Memory::allocate(*this);
  poison();
}

Buffer::~Buffer() {
  Memory::deallocate(*this);
  Memory::remove(this);
}

void Buffer::poison() {
  if (storage_ == Storage::kDense) std::memset(host_, kPoison, bytes_);
}

std::vector<Traffic> take_traffic() { return Memory::take_traffic(); }

const void* checked_read(const void* device_address, size_t bytes, size_t alignment, const Site& site) {
  return Memory::check("read", reinterpret_cast<uintptr_t>(device_address), bytes, alignment, site);
}

void* checked_write(void* device_address, size_t bytes, size_t alignment, const Site& site) {
  return Memory::check("write", reinterpret_cast<uintptr_t>(device_address), bytes, alignment, site);
}

}  // namespace simt
