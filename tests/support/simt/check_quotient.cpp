// check_quotient MOST: checks quotient() (csrc/cuda/device/vector_access.cuh) for all divisors up to MOST, where errors
// are most likely: next to multiples of the divisor, by small factors and, up to 2^50, by factors next to powers of
// two. Prints errors.
#include <cstdlib>
#include <iostream>

#include "cuda/device/vector_access.cuh"
#include "plan/partition.h"

int main(int, char** argv) {
  constexpr int64_t kMostValue = int64_t{1} << 50;
  int64_t checked = 0, wrong = 0;
  for (int64_t b = 1; b <= std::atoll(argv[1]); ++b) {
    const bnk::Divisor divisor = bnk::make_divisor(b);
    const auto check = [&](int64_t multiple) {
      for (int64_t a = multiple * b - 1; a <= multiple * b + 1; ++a) {
        if (a < 0 || a > kMostValue) continue;
        ++checked;
        const int64_t result = bnk::quotient(a, divisor);
        if (result == a / b) continue;
        if (++wrong <= 5) std::cout << a << " / " << b << " is " << a / b << ", not " << result << '\n';
      }
    };
    for (int64_t multiple = 0; multiple <= 256; ++multiple) check(multiple);
    for (int64_t power = 512; power <= kMostValue / b; power *= 2) {
      for (int64_t multiple = power - 1; multiple <= power + 1; ++multiple) check(multiple);
    }
  }
  std::cout << checked << " checked, " << wrong << " wrong\n";
  return wrong == 0 ? 0 : 1;
}
