// Huge pages for large results: a large tensor is fresh memory from the system every time, and with 4 KB pages its first
// write spends several times longer in page faults than in arithmetic. With 2 MB pages there are 512 times fewer.
//
//   BNKERNELS_CPU_HUGE_PAGES=0    leaves memory as it comes (default 1; read once)
//
// Linux, where transparent huge pages are "madvise" or "always"; elsewhere nothing happens. Only whole huge pages inside
// of the result are asked for, so memory use does not grow.
#include "pages.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bnk::cpu {
namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
constexpr int64_t kLeastBytes = 4 * int64_t{kHugePage};  // less is recycled by the allocator, or soon written anyway

bool wanted() {
  const char* value = std::getenv("BNKERNELS_CPU_HUGE_PAGES");
  const std::string text = value == nullptr ? "" : value;
  if (text == "0") return false;
  if (text.empty() || text == "1") return true;
  throw std::runtime_error("BNKERNELS_CPU_HUGE_PAGES=" + text + ": expected 0 or 1");
}

}  // namespace

void prefer_huge_pages(void* data, int64_t bytes) {
  if (bytes < kLeastBytes) return;
  static const bool advise = wanted();
  if (!advise) return;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
#endif
}

}  // namespace bnk::cpu
