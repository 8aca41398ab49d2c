// SharedMemory: one block's arena of shared memory. It is poisoned when the block starts. Gaps separate its arrays;
// AddressSanitizer forbids access to them, and every build checks them after the block has ended.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "simt/buffers.h"
#include "simt/fiber.h"

namespace simt {

class SharedMemory {
 public:
  explicit SharedMemory(size_t capacity) : capacity_(capacity), arena_(new (std::align_val_t{kGap}) char[bytes()]) {
    arrays_.reserve(64);
  }
  ~SharedMemory() {
    permit_access(arena_, bytes());
    ::operator delete[](arena_, std::align_val_t{kGap});
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // `size`: the part of the capacity that this block may use.
  void start_block(size_t size) {
    size_ = size;
    permit_access(arena_, bytes());
    std::memset(arena_, kPoison, size_ + kAllGaps);
    forbid_access(arena_, bytes());
    arrays_.clear();
    used_ = 0;
    top_ = kGap;
  }

  // Overwrites the arrays, so that an access that is not ordered before the block's end is a race, whatever the
  // schedule.
  void end_block() {
    for (const Array& array : arrays_) std::memset(array.begin, kPoison, array.size);
  }

  // The array for this key, created on first use. nullptr if it does not fit.
  void* array(const void* key, const char* name, size_t size) {
    for (const Array& array : arrays_) {
      if (array.key == key) return array.begin;
    }
    const size_t rounded = (size + kAlignment - 1) / kAlignment * kAlignment;
    if (used_ + rounded > size_ || arrays_.size() == kMaxArrays) return nullptr;
    char* begin = arena_ + top_;
    arrays_.push_back({key, name, begin, size});
    used_ += rounded;
    top_ += rounded + kGap;
    permit_access(begin, size);
    return begin;
  }

  // The address in another block's arena that corresponds to `own` in this one; nullptr if it is in no array that both
  // have.
  const void* twin(const void* own, const SharedMemory& other) const {
    const char* byte = static_cast<const char*>(own);
    for (const Array& array : arrays_) {
      if (byte < array.begin || byte >= array.begin + array.size) continue;
      for (const Array& twin : other.arrays_) {
        if (twin.key == array.key) return twin.begin + (byte - array.begin);
      }
    }
    return nullptr;
  }

  size_t used() const { return used_; }

  // The name of an array whose neighbouring bytes were changed; nullptr if there is none.
  const char* overrun() const {
    for (const Array& array : arrays_) {
      if (changed(array.begin - kGap, kGap) || changed(array.begin + array.size, kGap)) return array.name;
    }
    return nullptr;
  }

 private:
  static constexpr size_t kAlignment = 16;
  static constexpr size_t kGap = 64;
  static constexpr size_t kMaxArrays = 32;
  static constexpr size_t kAllGaps = (kMaxArrays + 1) * kGap;

  struct Array {
    const void* key;
    const char* name;
    char* begin;
    size_t size;
  };

  size_t bytes() const { return capacity_ + kAllGaps; }

  static bool changed(const char* begin, size_t size) {
    for (size_t i = 0; i < size; ++i) {
      if (static_cast<unsigned char>(begin[i]) != kPoison) return true;
    }
    return false;
  }

  size_t capacity_;
  char* arena_;
  std::vector<Array> arrays_;
  size_t size_ = 0;
  size_t used_ = 0;
  size_t top_ = 0;
};

}  // namespace simt
