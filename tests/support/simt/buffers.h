// Global memory: named buffers whose every access is checked and counted.
//
// A kernel never receives a buffer's real address. It receives a device address: one of a range that no process maps, with
// one terabyte of it to each buffer. So
//   - an index however far out of bounds is out of bounds of its own buffer, never inside a neighbour;
//   - memory reached past the primitives' load and store (a plain x[i]) faults on the spot, so the counts are complete;
//   - the alignment of device addresses is what the test asks for, in bytes from a 16-byte boundary.
// The primitives translate a device address, and then do a plain C++ access at the place where the kernel's line is inlined:
// the race detector sees the access itself.
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
  // `bytes` bytes, poisoned, at `misalignment` bytes past a 256-byte boundary. At most 128 buffers live at a time. A sparse
  // one is for a tensor larger than memory, of which a launch touches little: it is zero, not poisoned, and takes up what
  // is touched.
  enum class Storage { kDense, kSparse };
  Buffer(std::string name, size_t bytes, size_t misalignment = 0, Storage storage = Storage::kDense);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // What kernels are given.
  template <typename T>
  T* device() const {
    return reinterpret_cast<T*>(device_address_);
  }
  // What the test reads and writes between launches.
  template <typename T>
  T* host() const {
    return reinterpret_cast<T*>(host_);
  }
  size_t bytes() const { return bytes_; }
  const std::string& name() const { return name_; }

  // All bits set: a quiet NaN in every floating-point format, -1 and the like in integers. Nothing if sparse.
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

// Bytes that one launch moved between the kernel and one buffer.
struct Traffic {
  std::string buffer;
  size_t bytes_read;
  size_t bytes_written;
};

// The traffic of every living buffer since the last call.
std::vector<Traffic> take_traffic();

// Device address -> the real one, counted. `bytes` at an address aligned to `alignment`, wholly inside one buffer: anything
// else ends the launch with a fault that names the buffer, the thread and the kernel's line.
const void* checked_read(const void* device_address, size_t bytes, size_t alignment, const Site& site);
void* checked_write(void* device_address, size_t bytes, size_t alignment, const Site& site);

inline constexpr unsigned char kPoison = 0xff;

}  // namespace simt
