#include "relu_bounds.h"

#include "../core/relu_bounds.h"
#include "schedule.h"
#include "simd/scalar.h"

namespace bnk::cpu {
namespace {

constexpr int64_t kSerialChannels = 1024;  // below, starting threads costs more than it saves
constexpr int64_t kPieceChannels = 256;

// Of the bits of a 16-bit float: not 0 or less. NaN is not. Widened it could be subnormal, which is slow.
bool passes_relu(uint16_t bits, uint16_t infinity) {
  const uint16_t magnitude = bits & 0x7fff;
  return magnitude > infinity || (magnitude != 0 && magnitude == bits);
}

// What of a value y is left by storage, and the largest value of which nothing is.
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
  static constexpr float kLargestZero = 0;  // or too near to matter
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
    // The bias that is given serves the estimate from which the end is searched, and this alone.
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
