// Huge pages for large results.
#pragma once

#include <cstdint>

namespace bnk::cpu {

// Asks the system to back `bytes` at `data`, about to be written as a whole, with huge pages. A hint: nothing else changes.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace bnk::cpu
