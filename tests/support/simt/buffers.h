// Global memory: named buffers that check and count every access.
//
// Kernels never receive a buffer's host address. They receive a device address, from a range that no process maps and
// in which each buffer owns one terabyte. Therefore
//   - an index that is out of bounds, however far, is out of bounds of its own buffer and never inside another one;
//   - an access that bypasses the primitives' load and store (a plain x[i]) faults at once, so the counts are complete;
//   - device addresses have the alignment that the test asks for, in bytes past a 16-byte boundary.
// The primitives translate a device address and then do a plain C++ access, inlined into the kernel's line, so the race
// detector sees the access itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

namespace simt {

using Site = std::source_location;

class Buffer {
 public:
  // `bytes` poisoned bytes at `misalignment` bytes past a 256-byte boundary. At most 128 buffers can exist at the same
  // time. A sparse buffer is for a tensor larger than memory of which a launch touches little: it is zero instead of
  // poisoned, and only the pages that are touched take up memory.
  enum class Storage { kDense, kSparse };
  Buffer(std::string name, size_t bytes, size_t misalignment = 0, Storage storage = Storage::kDense);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // The address that kernels receive.
  template <typename T>
  T* device() const {
    return reinterpret_cast<T*>(device_address_);
  }
  // The address that the test reads and writes between launches.
  template <typename T>
  T* host() const {
    return reinterpret_cast<T*>(host_);
  }
  size_t bytes() const { return bytes_; }
  const std::string& name() const { return name_; }

  // Sets all bits: a quiet NaN in every floating-point format, -1 in signed integers. Does nothing to a sparse buffer.
  void poison();

 private:
  friend struct Memory;
  std::string name_;
  size_t bytes_;
  size_t misalignment_;
  Storage storage_;
  uintptr_t device_address_;
  char* host_;
  size_t bytes_read_ = 0;
  size_t bytes_written_ = 0;
};

// The bytes that one launch read from and wrote to one buffer.
struct Traffic {
  std::string buffer;
  size_t bytes_read;
  size_t bytes_written;
};

// The traffic of all existing buffers since the last call.
std::vector<Traffic> take_traffic();

// Translates a device address to the host address and counts the access. The `bytes` bytes must lie inside one buffer,
// at an address aligned to `alignment`. Otherwise, the launch ends with a fault that names the buffer, the thread and
// the kernel's line.
const void* checked_read(const void* device_address, size_t bytes, size_t alignment, const Site& site);
void* checked_write(void* device_address, size_t bytes, size_t alignment, const Site& site);

inline constexpr unsigned char kPoison = 0xff;

}  // namespace simt
