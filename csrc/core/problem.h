// Problem: what one BatchNorm call computes, and the raw-pointer arguments of each direction.
//
// Plain data only: no torch, no CUDA. The CUDA launchers, the CPU backend and the host execution of the kernels
// (tests/support/simt) all take these structs, so a backend is three functions over them.
//
// Every input is described as one dense array [outer][channels][inner]:
//
//   channels-first  (N, C, *spatial) contiguous          outer = N               inner = prod(spatial)
//   channels-last   (N, *spatial, C) in memory, or 2-D   outer = N*prod(spatial) inner = 1
//
// Element (o, c, i) lies at offset (o*channels + c)*inner + i; channel c has outer*inner elements.
#pragma once

#include <cstdint>

namespace bnk {

enum class Dtype : int8_t { kFloat64, kFloat32, kFloat16, kBFloat16 };

constexpr int size_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// The dtype of the arithmetic and of the saved statistics: float64 for float64 data, float32 otherwise.
constexpr Dtype accumulate_dtype(Dtype dtype) { return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }

struct Problem {
  int64_t outer;
  int64_t channels;
  int64_t inner;
  Dtype dtype;  // of x, y and their gradients

  constexpr bool channels_last() const { return inner == 1; }
  constexpr int64_t elements_per_channel() const { return outer * inner; }
  constexpr int64_t elements() const { return outer * channels * inner; }
};

// A dense vector with one value per channel, of any supported dtype. Optional vectors have data == nullptr.
struct ConstPerChannel {
  const void* data;
  Dtype dtype;
};

struct PerChannel {
  void* data;
  Dtype dtype;

  constexpr operator ConstPerChannel() const { return {data, dtype}; }
};

// Applied to each normalised value v before it is written; the residual and the ReLU are both optional:
//   y = relu(v + residual)
// After a ReLU without a residual, the backward needs only one interval per channel: y > 0 where low <= x <= high
// (relu_bounds.h).
struct Epilogue {
  const void* residual = nullptr;  // x's dtype and layout
  bool relu = false;
  PerChannel low = {nullptr, Dtype::kFloat32};   // out, accumulate_dtype, or null; for relu without residual
  PerChannel high = {nullptr, Dtype::kFloat32};  // out, as low

  constexpr bool enabled() const { return residual != nullptr || relu; }
};

// Training forward (Ioffe & Szegedy 2015, Algorithm 1):
//   mean_c = sum(x)/n     var_c = sum((x-mean_c)^2)/n     invstd_c = 1/sqrt(var_c + eps)
//   v = (x - mean_c) * invstd_c * weight_c + bias_c       (weight defaults to 1, bias to 0)
//   y = epilogue(v)
// Each of the running statistics is optional and updated independently:
//   running_mean += factor*(mean - running_mean)    running_var += factor*(var*n/(n-1) - running_var)
// num_batches_tracked, if given, is first incremented by 1. factor = momentum, or 1/num_batches_tracked if cumulative.
// Precondition: elements_per_channel() >= 2 and channels >= 1.
struct ForwardTrainArgs {
  Problem problem;
  const void* x;
  void* y;
  ConstPerChannel weight;
  ConstPerChannel bias;
  PerChannel running_mean;
  PerChannel running_var;
  int64_t* num_batches_tracked;
  double momentum;
  bool cumulative;
  double eps;
  PerChannel mean;    // out, accumulate_dtype, never null
  PerChannel invstd;  // out, accumulate_dtype, never null
  Epilogue epilogue = {};
};

// Inference forward (Algorithm 2): the same y from the running statistics. mean and invstd receive the values used, so
// that a later backward is unaffected by updates of the running statistics in between. Precondition: elements() >= 1.
struct ForwardEvalArgs {
  Problem problem;
  const void* x;
  void* y;
  ConstPerChannel weight;
  ConstPerChannel bias;
  ConstPerChannel running_mean;
  ConstPerChannel running_var;
  double eps;
  PerChannel mean;    // out, accumulate_dtype, never null
  PerChannel invstd;  // out, accumulate_dtype, never null
  Epilogue epilogue = {};
};

// Backward of both forwards. xhat = (x - mean)*invstd, and sums run over the n elements of a channel. g = grad_y; after
// a ReLU, g = grad_y where relu_low <= x <= relu_high and 0 elsewhere:
//   grad_bias = sum(g)     grad_weight = sum(g*xhat)
//   training:  grad_x = weight*invstd*(g - grad_bias/n - xhat*grad_weight/n)
//   inference: grad_x = weight*invstd*g
// Each of the three outputs may be null and is then not computed. Precondition: elements() >= 1.
struct BackwardArgs {
  Problem problem;
  const void* grad_y;
  const void* x;
  void* grad_x;
  ConstPerChannel weight;
  ConstPerChannel mean;    // accumulate_dtype, as the forward returned it
  ConstPerChannel invstd;  // accumulate_dtype, as the forward returned it
  PerChannel grad_weight;
  PerChannel grad_bias;
  bool training;
  ConstPerChannel relu_low = {nullptr, Dtype::kFloat32};  // accumulate_dtype, as the forward returned it; null: no ReLU
  ConstPerChannel relu_high = {nullptr, Dtype::kFloat32};  // as relu_low

  constexpr bool has_relu() const { return relu_low.data != nullptr; }
};

}  // namespace bnk
