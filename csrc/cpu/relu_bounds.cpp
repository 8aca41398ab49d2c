#include "relu_bounds.h"

#include "../core/relu_bounds.h"
#include "schedule.h"
#include "simd/scalar.h"

namespace bnk::cpu {
namespace {

constexpr int64_t kSerialChannels = 1024;  // below, starting threads costs more than it saves
constexpr int64_t kPieceChannels = 256;

// Whether the 16-bit float with these bits is greater than 0 or NaN. Tests the bits, as a conversion to float could
// give a subnormal, which is slow.
bool passes_relu(uint16_t bits, uint16_t infinity) {
  const uint16_t magnitude = bits & 0x7fff;
  return magnitude > infinity || (magnitude != 0 && magnitude == bits);
}

// Stored<T>: passes(v) is whether y = v is still positive (or NaN) after it is rounded to T; kLargestZero is the
// largest value that rounds to 0.
template <typename T>
struct Stored {
  using opmath_t = T;
  static constexpr T kLargestZero = 0;
  static bool passes(T value) { return !(value <= 0); }
};
template <>
struct Stored<Float16> {
  using opmath_t = float;
  static constexpr float kLargestZero = 0x1p-25f;
  static bool passes(float value) { return passes_relu(to_float16(value).bits, 0x7c00); }
};
template <>
struct Stored<BFloat16> {
  using opmath_t = float;
  static constexpr float kLargestZero = 0;  // an approximation: the exact value is too small to matter
  static bool passes(float value) { return passes_relu(to_bfloat16(value).bits, 0x7f80); }
};

template <typename T>
void write_bounds(const Epilogue& epilogue, const AffineVectors& affine, int64_t begin, int64_t end) {
  using opmath_t = typename Stored<T>::opmath_t;
  for (int64_t c = begin; c < end; ++c) {
    const opmath_t mean = static_cast<const opmath_t*>(affine.mean)[c];
    const opmath_t invstd = static_cast<const opmath_t*>(affine.invstd)[c];
    const opmath_t weight = static_cast<const opmath_t*>(affine.weight)[c];
    const opmath_t bias = static_cast<const opmath_t*>(affine.bias)[c];
    // The formula of AffineVectors, operation by operation.
    const auto passes = [=](opmath_t x) { return Stored<T>::passes((x - mean) * invstd * weight + bias); };
    // The shifted bias only affects the estimate at which the search starts.
    const ReluBounds<opmath_t> range = relu_bounds(mean, invstd, weight, bias - Stored<T>::kLargestZero, passes);
    static_cast<opmath_t*>(epilogue.low.data)[c] = range.low;
    static_cast<opmath_t*>(epilogue.high.data)[c] = range.high;
  }
}

}  // namespace

void write_relu_bounds(const Epilogue& epilogue, const Problem& problem, const AffineVectors& affine) {
  if (epilogue.low.data == nullptr) return;
  const auto write = problem.dtype == Dtype::kFloat64   ? write_bounds<double>
                     : problem.dtype == Dtype::kFloat32 ? write_bounds<float>
                     : problem.dtype == Dtype::kFloat16 ? write_bounds<Float16>
                                                        : write_bounds<BFloat16>;
  const int64_t channels = problem.channels;
  const int threads = channels < kSerialChannels ? 1 : threads_for(problem.elements());
  over_pieces(threads, (channels + kPieceChannels - 1) / kPieceChannels, [&](int64_t piece) {
    const int64_t begin = piece * kPieceChannels;
    write(epilogue, affine, begin, std::min(begin + kPieceChannels, channels));
  });
}

}  // namespace bnk::cpu
