// Scratch: a short-lived array, in place while it is small, on the heap otherwise. Not initialised.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace bnk::cpu {

template <typename T, int64_t kInPlace>
class Scratch {
 public:
  explicit Scratch(int64_t size) {
    if (size > kInPlace) heap_.reset(new T[static_cast<size_t>(size)]);
  }
  T* data() { return heap_ ? heap_.get() : in_place_; }

 private:
  T in_place_[kInPlace];
  std::unique_ptr<T[]> heap_;
};

}  // namespace bnk::cpu
