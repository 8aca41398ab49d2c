#include "relu_ranges.h"

#include "../relu_range.h"
#include "scalar.h"
#include "schedule.h"

namespace bnk::cpu {
namespace {

constexpr int64_t kSerialChannels = 1024;  // below, starting threads costs more than it saves
constexpr int64_t kPieceChannels = 256;

// As the kernels round a result, and as it is then compared with 0.
template <typename T>
struct Rounded;
template <>
struct Rounded<double> {
  using Real = double;
  static double of(double value) { return value; }
};
template <>
struct Rounded<float> {
  using Real = float;
  static float of(float value) { return value; }
};
template <>
struct Rounded<Float16> {
  using Real = float;
  static float of(float value) { return to_float(to_float16(value)); }
};
template <>
struct Rounded<BFloat16> {
  using Real = float;
  static float of(float value) { return to_float(to_bfloat16(value)); }
};

template <typename T>
void write_ranges(const Epilogue& epilogue, const AffineVectors& affine, int64_t begin, int64_t end) {
  using Real = typename Rounded<T>::Real;
  for (int64_t c = begin; c < end; ++c) {
    const Real mean = static_cast<const Real*>(affine.mean)[c];
    const Real invstd = static_cast<const Real*>(affine.invstd)[c];
    const Real weight = static_cast<const Real*>(affine.weight)[c];
    const Real bias = static_cast<const Real*>(affine.bias)[c];
    // The formula of AffineVectors, operation by operation.
    const auto passes = [=](Real x) { return !(Rounded<T>::of((x - mean) * invstd * weight + bias) <= 0); };
    const ReluRange<Real> range = relu_range(mean, invstd, weight, bias, passes);
    static_cast<Real*>(epilogue.low.data)[c] = range.low;
    static_cast<Real*>(epilogue.high.data)[c] = range.high;
  }
}

}  // namespace

void write_relu_ranges(const Epilogue& epilogue, const Problem& problem, const AffineVectors& affine) {
  if (epilogue.low.data == nullptr) return;
  const auto write = problem.dtype == Dtype::kFloat64   ? write_ranges<double>
                     : problem.dtype == Dtype::kFloat32 ? write_ranges<float>
                     : problem.dtype == Dtype::kFloat16 ? write_ranges<Float16>
                                                        : write_ranges<BFloat16>;
  const int64_t channels = problem.channels;
  const int threads = channels < kSerialChannels ? 1 : threads_for(problem.elements());
  over_pieces(threads, (channels + kPieceChannels - 1) / kPieceChannels, [&](int64_t piece) {
    const int64_t begin = piece * kPieceChannels;
    write(epilogue, affine, begin, std::min(begin + kPieceChannels, channels));
  });
}

}  // namespace bnk::cpu
