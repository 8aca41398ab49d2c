// Selects the SIMD level: the widest one that this processor supports, or the one that BNKERNELS_CPU_SIMD names.
//
//   BNKERNELS_CPU_SIMD=baseline|avx2|avx512|avx512_bf16    read once, at the first call
//
// All levels give the same bits.
//
// An unknown name, or a level that this processor or build does not have, is an error: a test that asks for a level
// must not silently run another.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../backend.h"
#include "../kernels.h"

namespace bnk::cpu {
namespace {

struct Level {
  const char* name;
  bool available;
  const Kernels& (*kernels)(Dtype dtype);
};

Level choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const Level levels[] = {
      {"avx512_bf16", has_avx512 && __builtin_cpu_supports("avx512bf16"), avx512_bf16::kernels},
      {"avx512", has_avx512, avx512::kernels},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
       avx2::kernels},
      {"baseline", true, baseline::kernels},
  };
#else
  const Level levels[] = {{"baseline", true, baseline::kernels}};
#endif
  const char* wanted = std::getenv("BNKERNELS_CPU_SIMD");
  const bool any = wanted == nullptr || *wanted == '\0';
  std::string available;
  for (const Level& level : levels) {
    if (!level.available) continue;
    if (any || std::string(wanted) == level.name) return level;
    available += std::string(available.empty() ? "" : ", ") + level.name;
  }
  throw std::runtime_error("BNKERNELS_CPU_SIMD=" + std::string(wanted) + ": this build and processor have " +
                           available);
}

const Level& level() {
  static const Level chosen = choose();
  return chosen;
}

}  // namespace

const Kernels& kernels(Dtype dtype) { return level().kernels(dtype); }

const char* simd_level() { return level().name; }

}  // namespace bnk::cpu
