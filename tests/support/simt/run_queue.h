// RunQueue: the set of runnable threads as a bit set, with several ways to select the next one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace simt {

// splitmix64: a seed gives the same sequence on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  // Uniform in [0, count), up to a bias below 2^-40 for the counts in use.
  size_t below(size_t count) { return static_cast<size_t>(next() % count); }

 private:
  uint64_t state_;
};

// A range of neighbouring threads: [first, end).
struct Range {
  size_t first = 0;
  size_t end = 0;
};

class RunQueue {
 public:
  explicit RunQueue(size_t capacity) : capacity_(capacity), words_((capacity + 63) / 64) {}

  bool empty() const { return size_ == 0; }

  void insert(size_t item) {
    size_ += !contains(item);
    words_[item / 64] |= uint64_t{1} << (item % 64);
  }

  // The functions below remove the item that they return. The queue must not be empty.

  // Uniformly random among the items outside the range, or among those inside if there are no others.
  size_t take_random(Random& random, const Range& last_resort) {
    const size_t outside = size_ - count_in(last_resort);
    const Range skipped = outside > 0 ? last_resort : Range{};
    size_t before = random.below(outside > 0 ? outside : size_);
    for (size_t word = 0;; ++word) {
      uint64_t bits = words_[word] & ~mask(word, skipped);
      const auto here = static_cast<size_t>(__builtin_popcountll(bits));
      if (before >= here) {
        before -= here;
        continue;
      }
      while (before-- > 0) bits &= bits - 1;
      return take(word * 64 + static_cast<size_t>(__builtin_ctzll(bits)));
    }
  }

  // The next item above `last`, wrapping around to the lowest.
  size_t take_above(size_t last) {
    size_t item = last;
    do item = item + 1 < capacity_ ? item + 1 : 0;
    while (!contains(item));
    return take(item);
  }

  // The next item below `last`, wrapping around to the highest.
  size_t take_below(size_t last) {
    size_t item = last;
    do item = (item > 0 ? item : capacity_) - 1;
    while (!contains(item));
    return take(item);
  }

 private:
  bool contains(size_t item) const { return words_[item / 64] >> (item % 64) & 1; }

  // The bits of one word that lie in the range.
  static uint64_t mask(size_t word, const Range& range) {
    const auto below = [word](size_t end) {
      const size_t bits = end <= word * 64 ? 0 : end - word * 64;
      return bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
    };
    return below(range.end) & ~below(range.first);
  }

  size_t count_in(const Range& range) const {
    size_t count = 0;
    for (size_t word = range.first / 64; word * 64 < range.end; ++word) {
      count += static_cast<size_t>(__builtin_popcountll(words_[word] & mask(word, range)));
    }
    return count;
  }

  size_t take(size_t item) {
    words_[item / 64] &= ~(uint64_t{1} << (item % 64));
    --size_;
    return item;
  }

  size_t capacity_;
  size_t size_ = 0;
  std::vector<uint64_t> words_;
};

}  // namespace simt
