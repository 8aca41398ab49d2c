//   BNKERNELS_CPU_CACHE_MB=1024    size limit in MiB; the least recently freed block is evicted first. 0: no cache
//   BNKERNELS_CPU_HUGE_PAGES=1     put blocks on 2 MB pages where they fill them; 0: on regular pages
//
// Both are read once. Linux only; elsewhere nothing is cached.
#include "result_cache.h"

#if defined(__linux__)

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

namespace bnk::cpu {
namespace {

constexpr size_t kMegabyte = size_t{1} << 20;
constexpr size_t kHugePage = 2 * kMegabyte;
constexpr size_t kLeastBytes = kMegabyte / 4;   // malloc caches smaller blocks
constexpr size_t kSizesInADoubling = 8;         // blocks whose sizes differ by less than an eighth are interchangeable
constexpr size_t kNotOffered = 64 * kMegabyte;  // freed last: about to be reused, and madvise has a cost
constexpr size_t kDefaultLimit = 1024;          // MiB

size_t setting(const char* name, size_t otherwise, size_t most) {
  const char* value = std::getenv(name);
  const std::string text = value == nullptr ? "" : value;
  if (text.empty()) return otherwise;
  size_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error == std::errc() && end == text.data() + text.size() && number <= most) return number;
  throw std::runtime_error(std::string(name) + "=" + text + ": expected a whole number from 0 to " +
                           std::to_string(most));
}

// Rounds up to a size class. `bytes` is at least kLeastBytes.
size_t block_size(size_t bytes) {
  size_t step = kLeastBytes / kSizesInADoubling;
  while (bytes / 2 >= step * kSizesInADoubling) step *= 2;
  return (bytes + step - 1) / step * step;
}

// The part of a block that lies on huge pages: the pages that it fills, and one that it fills to at least three
// quarters.
size_t huge_part(size_t size) { return (size + kHugePage / 4) / kHugePage * kHugePage; }

// The size of a block's mapping.
size_t mapped_size(size_t size) { return std::max(size, huge_part(size)); }

struct Block {
  void* data;
  size_t size;
  bool offered = false;  // to the system: marked with MADV_FREE
};

void unmap(const Block& block) { (void)munmap(block.data, mapped_size(block.size)); }

class ResultCache {
 public:
  // Never destroyed, since results may outlive static objects.
  static ResultCache& instance() {
    static ResultCache& only = *new ResultCache;
    return only;
  }

  void* take(size_t bytes) {
    if (bytes < kLeastBytes || limit_ == 0) return nullptr;
    const size_t size = block_size(bytes);
    {
      const std::lock_guard lock(mutex_);
      const auto last = std::find_if(cached_.rbegin(), cached_.rend(), [&](const Block& b) { return b.size == size; });
      if (last != cached_.rend()) {
        void* data = last->data;
        cached_.erase(std::next(last).base());
        cached_bytes_ -= size;
        return data;
      }
    }
    void* data = map(size);
    return data != nullptr || release() == 0 ? data : map(size);
  }

  void give_back(void* data, size_t bytes) noexcept {
    const Block freed{data, block_size(bytes)};
    std::unique_lock lock(mutex_);
    try {
      cached_.push_back(freed);
    } catch (const std::bad_alloc&) {  // A deleter must not throw: unmap the block instead.
      lock.unlock();
      return unmap(freed);
    }
    cached_bytes_ += freed.size;
    while (cached_bytes_ > limit_) {
      const Block oldest = cached_.front();
      cached_.erase(cached_.begin());
      cached_bytes_ -= oldest.size;
      lock.unlock();
      unmap(oldest);
      lock.lock();
    }
    offer_older();
  }

  size_t release() {
    std::vector<Block> dropped;
    {
      const std::lock_guard lock(mutex_);
      dropped.swap(cached_);
      cached_bytes_ = 0;
    }
    size_t bytes = 0;
    for (const Block& block : dropped) {
      unmap(block);
      bytes += block.size;
    }
    return bytes;
  }

 private:
  ResultCache() {
    // If another thread held the mutex at a fork, it would stay locked in the child.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  // Marks all blocks as free but the most recently freed ones. Invariant: all blocks older than a marked one are
  // marked, so the loop ends at the first marked one.
  void offer_older() {
    size_t younger = 0;
    for (auto block = cached_.rbegin(); block != cached_.rend() && !block->offered; ++block) {
      younger += block->size;
      if (younger <= kNotOffered) continue;
      (void)madvise(block->data, mapped_size(block->size), MADV_FREE);  // huge pages as a whole
      block->offered = true;
    }
  }

  void* map(size_t size) const {
    const size_t huge = huge_pages_ ? huge_part(size) : 0;
    const size_t wanted = mapped_size(size);
    const size_t slack = huge > 0 ? kHugePage : 0;
    void* mapped = mmap(nullptr, wanted + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    if (huge == 0) return mapped;
    char* const begin = static_cast<char*>(mapped);
    const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
    if (before > 0) (void)munmap(begin, before);
    if (before < slack) (void)munmap(begin + before + wanted, slack - before);
    (void)madvise(begin + before, huge, MADV_HUGEPAGE);
    return begin + before;
  }

  const size_t limit_ = setting("BNKERNELS_CPU_CACHE_MB", kDefaultLimit, SIZE_MAX / kMegabyte) * kMegabyte;
  const bool huge_pages_ = setting("BNKERNELS_CPU_HUGE_PAGES", 1, 1) == 1;
  std::mutex mutex_;
  std::vector<Block> cached_;  // in the order in which they were freed
  size_t cached_bytes_ = 0;
};

}  // namespace

void* take_memory(size_t bytes) { return ResultCache::instance().take(bytes); }

void give_memory_back(void* data, size_t bytes) { ResultCache::instance().give_back(data, bytes); }

size_t empty_result_cache() { return ResultCache::instance().release(); }

}  // namespace bnk::cpu

#else

namespace bnk::cpu {

void* take_memory(size_t) { return nullptr; }

void give_memory_back(void*, size_t) {}

size_t empty_result_cache() { return 0; }

}  // namespace bnk::cpu

#endif
