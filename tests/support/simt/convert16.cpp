// convert16 TO: applies one of float16.h's conversions to a stream of values, from stdin to stdout, in native byte
// order. TO is float_from_half, half_from_float, float_from_bfloat16 or bfloat16_from_float.
#include <cstdio>
#include <cstring>

#include "simt/float16.h"

namespace {

template <typename To, typename From>
int convert(To (*conversion)(From)) {
  From value;
  while (std::fread(&value, sizeof value, 1, stdin) == 1) {
    const To result = conversion(value);
    std::fwrite(&result, sizeof result, 1, stdout);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const auto asked = [&](const char* name) { return argc == 2 && std::strcmp(argv[1], name) == 0; };
  if (asked("float_from_half")) return convert(simt::half_to_float);
  if (asked("half_from_float")) return convert(simt::float_to_half);
  if (asked("float_from_bfloat16")) return convert(simt::bfloat16_to_float);
  if (asked("bfloat16_from_float")) return convert(simt::float_to_bfloat16);
  return 2;
}
