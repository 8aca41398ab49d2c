// Problem: WHAT one BatchNorm call computes, and the raw-pointer arguments of each direction.
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

// The dtype of arithmetic and of the saved statistics: float64 for float64 data, else float32.
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

// A dense vector with one value per channel, of any supported dtype. data == nullptr: not there.
struct ConstPerChannel {
  const void* data;
  Dtype dtype;
};

struct PerChannel {
  void* data;
  Dtype dtype;

  constexpr operator ConstPerChannel() const { return {data, dtype}; }
};

// What a normalised value v passes before it is written, each part if it is there:
//   y = relu(v + residual)
// Of a ReLU without a residual the backward needs no more than an interval for each channel: y > 0 where
// low <= x <= high (relu_bounds.h).
struct Epilogue {
  const void* residual = nullptr;  // of x's dtype, where x's elements lie
  bool relu = false;
  PerChannel low = {nullptr, Dtype::kFloat32};   // out, accumulate_dtype, or null; with relu and no residual
  PerChannel high = {nullptr, Dtype::kFloat32};  // out, as low

  constexpr bool enabled() const { return residual != nullptr || relu; }
};

// Training forward (Ioffe & Szegedy 2015, Algorithm 1):
//   mean_c = sum(x)/n     var_c = sum((x-mean_c)^2)/n     invstd_c = 1/sqrt(var_c + eps)
//   v = (x - mean_c) * invstd_c * weight_c + bias_c       (no weight: 1, no bias: 0)
//   y = v, or what the epilogue makes of it
// and, where the running statistics are there, each on its own:
//   running_mean += factor*(mean - running_mean)    running_var += factor*(var*n/(n-1) - running_var)
// num_batches_tracked, where there, is incremented by 1 first. factor = momentum, or, if cumulative,
// 1/num_batches_tracked. Precondition: elements_per_channel() >= 2 and channels >= 1.
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

// Inference forward (Algorithm 2): the same y from the running statistics. mean and invstd receive what was used, so
// that a later backward does not depend on what happens to the buffers meanwhile.
// Precondition: elements() >= 1.
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

// Backward of both. With xhat = (x - mean)*invstd, sums over the n elements of a channel, and g = grad_y, or, behind a
// ReLU, g = grad_y where relu_low <= x <= relu_high and 0 elsewhere:
//   grad_bias = sum(g)     grad_weight = sum(g*xhat)
//   training:  grad_x = weight*invstd*(g - grad_bias/n - xhat*grad_weight/n)
//   inference: grad_x = weight*invstd*g
// Any of the three outputs may be null: it is then not computed.
// Precondition: elements() >= 1.
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
