// The CPU backend, plain form: one channel after another, every sum in double.
#include "backend.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "scalar.h"

namespace bnk::cpu {
namespace {

double get(const double* p, int64_t i) { return p[i]; }
double get(const float* p, int64_t i) { return p[i]; }
double get(const Float16* p, int64_t i) { return to_float(p[i]); }
double get(const BFloat16* p, int64_t i) { return to_float(p[i]); }
void put(double* p, int64_t i, double v) { p[i] = v; }
void put(float* p, int64_t i, double v) { p[i] = static_cast<float>(v); }
void put(Float16* p, int64_t i, double v) { p[i] = to_float16(to_odd_float(v)); }
void put(BFloat16* p, int64_t i, double v) { p[i] = to_bfloat16(to_odd_float(v)); }

template <typename F>
void each_element(const Problem& p, int64_t c, F&& f) {
  for (int64_t o = 0; o < p.outer; ++o) {
    const int64_t base = (o * p.channels + c) * p.inner;
    for (int64_t i = 0; i < p.inner; ++i) f(base + i);
  }
}

template <typename F>
void each_channel(const Problem& p, F&& f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / p.elements_per_channel());
  at::parallel_for(0, p.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(c);
  });
}

template <typename F>
void with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat64: return f(double());
    case Dtype::kFloat32: return f(float());
    case Dtype::kFloat16: return f(Float16());
    case Dtype::kBFloat16: return f(BFloat16());
  }
}

}  // namespace

void forward_train(const ForwardTrainArgs& a) {
  double factor = a.momentum;
  if (a.num_batches_tracked != nullptr) {
    *a.num_batches_tracked += 1;
    if (a.cumulative) factor = 1.0 / static_cast<double>(*a.num_batches_tracked);
  }
  with_type(a.problem.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* x = static_cast<const T*>(a.x);
    T* y = static_cast<T*>(a.y);
    const double n = static_cast<double>(a.problem.elements_per_channel());
    each_channel(a.problem, [&](int64_t c) {
      double sum = 0, squares = 0;
      each_element(a.problem, c, [&](int64_t i) { sum += get(x, i); });
      const double mean = sum / n;
      each_element(a.problem, c, [&](int64_t i) { squares += (get(x, i) - mean) * (get(x, i) - mean); });
      const double var = squares / n, invstd = 1 / std::sqrt(var + a.eps);
      write(a.mean, c, mean);
      write(a.invstd, c, invstd);
      if (a.running_mean.data) {
        const double old = read(a.running_mean, c);
        write(a.running_mean, c, old + factor * (mean - old));
      }
      if (a.running_var.data) {
        const double old = read(a.running_var, c);
        write(a.running_var, c, old + factor * (squares / (n - 1) - old));
      }
      const double w = read_or(a.weight, c, 1), b = read_or(a.bias, c, 0);
      each_element(a.problem, c, [&](int64_t i) { put(y, i, (get(x, i) - mean) * invstd * w + b); });
    });
  });
}

void forward_eval(const ForwardEvalArgs& a) {
  with_type(a.problem.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* x = static_cast<const T*>(a.x);
    T* y = static_cast<T*>(a.y);
    each_channel(a.problem, [&](int64_t c) {
      const double mean = read(a.running_mean, c), invstd = 1 / std::sqrt(read(a.running_var, c) + a.eps);
      write(a.mean, c, mean);
      write(a.invstd, c, invstd);
      const double w = read_or(a.weight, c, 1), b = read_or(a.bias, c, 0);
      each_element(a.problem, c, [&](int64_t i) { put(y, i, (get(x, i) - mean) * invstd * w + b); });
    });
  });
}

void backward(const BackwardArgs& a) {
  with_type(a.problem.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* x = static_cast<const T*>(a.x);
    const T* g = static_cast<const T*>(a.grad_y);
    T* dx = static_cast<T*>(a.grad_x);
    const double n = static_cast<double>(a.problem.elements_per_channel());
    each_channel(a.problem, [&](int64_t c) {
      const double mean = read(a.mean, c), invstd = read(a.invstd, c), w = read_or(a.weight, c, 1);
      double db = 0, dw = 0;
      if (a.training || a.grad_weight.data || a.grad_bias.data) {
        each_element(a.problem, c, [&](int64_t i) {
          db += get(g, i);
          dw += get(g, i) * ((get(x, i) - mean) * invstd);
        });
      }
      write(a.grad_weight, c, dw);
      write(a.grad_bias, c, db);
      if (dx == nullptr) return;
      if (!a.training) db = dw = 0;
      each_element(a.problem, c, [&](int64_t i) {
        const double xhat = a.training ? (get(x, i) - mean) * invstd : 0;
        put(dx, i, w * invstd * (get(g, i) - db / n - xhat * (dw / n)));
      });
    });
  });
}

const char* simd_level() { return "baseline"; }

}  // namespace bnk::cpu
