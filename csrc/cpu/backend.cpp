// Entry points of the CPU backend: Ioffe & Szegedy 2015, Algorithms 1 and 2, and their gradients.
//
// This file computes the per-channel values: statistics, running statistics and coefficients, all in double and rounded
// once. tiling.h partitions the problem, schedule.h assigns the pieces to threads, and kernels.h declares the loops.
#include "backend.h"

#include <cmath>

#include "ranks.h"
#include "relu_bounds.h"
#include "schedule.h"
#include "simd/scalar.h"
#include "tiling.h"

namespace bnk::cpu {
namespace {

constexpr int64_t kMinRun = 32;          // elements; shorter runs are processed as columns
constexpr int64_t kInPlaceValues = 256;  // per-channel vectors up to this length need no heap allocation

// A per-channel vector in the arithmetic type: the caller's own memory if it has that dtype, otherwise a converted
// copy.
class Coefficients {
 public:
  Coefficients(ConstPerChannel vector, double otherwise, const Problem& problem)
      : dtype_(accumulate_dtype(problem.dtype)) {
    if (vector.data != nullptr && vector.dtype == dtype_) {
      data_ = vector.data;
      return;
    }
    make_space(problem);
    for (int64_t c = 0; c < problem.channels; ++c) write(space(), c, read_or(vector, c, otherwise));
  }
  // Uninitialized; written through space().
  explicit Coefficients(const Problem& problem) : dtype_(accumulate_dtype(problem.dtype)) { make_space(problem); }
  Coefficients(const Coefficients&) = delete;
  Coefficients& operator=(const Coefficients&) = delete;

  const void* data() const { return data_; }
  PerChannel space() { return {own_, dtype_}; }

 private:
  void make_space(const Problem& problem) {
    const int64_t bytes = problem.channels * size_of(dtype_);
    if (bytes > static_cast<int64_t>(sizeof(in_place_))) heap_.reset(new double[static_cast<size_t>(bytes / 8 + 1)]);
    data_ = own_ = heap_ ? heap_.get() : in_place_;
  }

  const Dtype dtype_;
  const void* data_ = nullptr;
  void* own_ = nullptr;
  std::unique_ptr<double[]> heap_;
  double in_place_[kInPlaceValues];
};

// Canonical form of a channels-first problem: a single channel is one run, whatever the outer size.
Problem normal_form(Problem problem) {
  if (problem.channels == 1) {
    problem.inner *= problem.outer;
    problem.outer = 1;
  }
  return problem;
}

// Calls f(tiling, bytes of a block) with the tiling of the problem. `tensors`: how many tensors of the problem's size
// should be in the cache at the same time. With statistics, in this call or in the call before it, these are all
// tensors that are read or written; otherwise only the result, since nothing else is used again.
template <typename F>
void with_tiling(const Problem& problem, int tensors, bool has_partials, const F& f) {
  const int64_t channel_bytes = problem.elements_per_channel() * size_of(problem.dtype) * tensors;
  if (problem.inner >= kMinRun || problem.channels == 1) {
    const Rows rows(problem, tensors, has_partials);
    return f(static_cast<const Tiling&>(rows), channel_bytes * rows.block_channels());
  }
  const Columns columns(problem, tensors, has_partials, threads_for(problem.elements()));
  f(static_cast<const Tiling&>(columns), channel_bytes * columns.block_channels());
}

// The threshold per element of a sum of squares below which float's underflow would be significant relative to eps: 0
// for any usual eps.
double underflow_floor(double eps) { return eps < 1e-36 ? 1e-30 : 0; }

// Mean and sum of squared deviations of x.
struct StatisticsOf {
  const Tiling& tiling;
  const void* x;
  double floor;

  void partials(int64_t block, int64_t split, Partial* out) const { tiling.welford(x, floor, block, split, out); }
  void merge(Partial* into, double before, const Partial& from, double count) const {
    combine_welford(into, before, from, count);
  }
};

template <typename Args>
NormalizeData data_of(const Args& args, const Epilogue& epilogue) {
  return {args.x, epilogue.residual, args.y, epilogue.relu};
}

struct TrainForward : StatisticsOf {
  const ForwardTrainArgs& args;
  AffineVectors affine;
  double factor;
  double n;
  static constexpr bool has_apply = true;

  void finalize(int64_t c, const Partial& total) const {
    const double mean = total.first;
    write(args.mean, c, mean);
    write(args.invstd, c, 1 / std::sqrt(total.second / n + args.eps));
    if (args.running_mean.data != nullptr) {
      const double old = read(args.running_mean, c);
      write(args.running_mean, c, old + factor * (mean - old));
    }
    if (args.running_var.data != nullptr) {
      const double old = read(args.running_var, c);
      write(args.running_var, c, old + factor * (total.second / (n - 1) - old));
    }
  }
  void apply(int64_t block, int64_t split) const {
    tiling.normalize(data_of(args, args.epilogue), affine, block, split);
  }
};

struct Backward {
  const BackwardArgs& args;
  const Tiling& tiling;
  GradientVectors vectors;
  PerChannel mean_g, slope;
  double n;
  bool has_apply;

  void partials(int64_t block, int64_t split, Partial* out) const {
    tiling.sums(args.grad_y, args.x, {args.mean.data, args.invstd.data, vectors.relu_bounds}, block, split, out);
  }
  void merge(Partial* into, double, const Partial& from, double) const {
    into->first += from.first;
    into->second += from.second;
  }
  void finalize(int64_t c, const Partial& total) const {
    write(args.grad_bias, c, total.first);
    write(args.grad_weight, c, total.second);
    if (!args.training || !has_apply) return;
    write(mean_g, c, total.first / n);
    write(slope, c, read(args.invstd, c) * (total.second / n));
  }
  void apply(int64_t block, int64_t split) const {
    tiling.gradient(args.grad_y, args.x, args.grad_x, vectors, block, split);
  }
};

// Computes y from a given mean and invstd. `tensors`: see with_tiling.
template <typename Args>
void normalize_given(const Args& args, const Epilogue& epilogue, int tensors) {
  const Problem problem = normal_form(args.problem);
  const Coefficients weight(args.weight, 1, problem);
  const Coefficients bias(args.bias, 0, problem);
  const AffineVectors affine{args.mean.data, args.invstd.data, weight.data(), bias.data()};
  with_tiling(problem, tensors, false, [&](const Tiling& tiling, int64_t) {
    run_apply(tiling, problem.elements(),
              [&](int64_t block, int64_t split) { tiling.normalize(data_of(args, epilogue), affine, block, split); });
  });
  write_relu_bounds(epilogue, problem, affine);
}

}  // namespace

void forward_train(const ForwardTrainArgs& args) {
  const int64_t count = args.num_batches_tracked != nullptr ? *args.num_batches_tracked + 1 : 0;
  const double factor = args.cumulative ? 1.0 / static_cast<double>(count) : args.momentum;
  const Problem problem = normal_form(args.problem);
  const Coefficients weight(args.weight, 1, problem);
  const Coefficients bias(args.bias, 0, problem);
  const AffineVectors affine{args.mean.data, args.invstd.data, weight.data(), bias.data()};
  const int tensors = args.epilogue.residual != nullptr ? 3 : 2;
  with_tiling(problem, tensors, true, [&](const Tiling& tiling, int64_t block_bytes) {
    const TrainForward work{{tiling, args.x, underflow_floor(args.eps)},
                            args,
                            affine,
                            factor,
                            static_cast<double>(problem.elements_per_channel())};
    run(tiling, work, problem.elements(), block_bytes);
  });
  write_relu_bounds(args.epilogue, problem, affine);
  if (args.num_batches_tracked != nullptr)
    *args.num_batches_tracked = count;  // last, so that a call that throws does not count
}

void forward_eval(const ForwardEvalArgs& args) {
  for (int64_t c = 0; c < args.problem.channels; ++c) {
    write(args.mean, c, read(args.running_mean, c));
    write(args.invstd, c, 1 / std::sqrt(read(args.running_var, c) + args.eps));
  }
  normalize_given(args, args.epilogue, 1);
}

void backward(const BackwardArgs& args) {
  const Problem problem = normal_form(args.problem);
  const bool has_apply = args.grad_x != nullptr;
  const bool has_partials =
      args.grad_weight.data != nullptr || args.grad_bias.data != nullptr || (args.training && has_apply);
  if (!has_apply && !has_partials) return;
  Coefficients scale(problem), mean_g(problem), slope(problem);
  if (has_apply) {
    for (int64_t c = 0; c < problem.channels; ++c) {
      write(scale.space(), c, read(args.invstd, c) * read_or(args.weight, c, 1));
    }
  }
  const GradientVectors vectors{args.mean.data,
                                scale.data(),
                                mean_g.data(),
                                args.training ? slope.data() : nullptr,
                                {args.relu_low.data, args.relu_high.data}};
  with_tiling(problem, has_partials ? 3 : 1, has_partials, [&](const Tiling& tiling, int64_t block_bytes) {
    const Backward work{args,           tiling,        vectors,
                        mean_g.space(), slope.space(), static_cast<double>(problem.elements_per_channel()),
                        has_apply};
    if (has_partials) {
      run(tiling, work, problem.elements(), block_bytes);
    } else {
      run_apply(tiling, problem.elements(), [&](int64_t block, int64_t split) { work.apply(block, split); });
    }
  });
}

// The steps of a batch norm across ranks that need a tiling. Combining the ranks needs none, see ranks.cpp.

namespace {

struct StatisticsOfRank : StatisticsOf {
  const StatisticsArgs& args;
  static constexpr bool has_apply = false;

  void finalize(int64_t c, const Partial& total) const {
    args.row[c] = total.first;
    args.row[args.problem.channels + c] = total.second;
  }
  void apply(int64_t, int64_t) const {}
};

}  // namespace

void statistics(const StatisticsArgs& args) {
  const Problem problem = normal_form(args.problem);
  args.row[2 * problem.channels] = static_cast<double>(problem.elements_per_channel());
  with_tiling(problem, 1, true, [&](const Tiling& tiling, int64_t block_bytes) {
    const StatisticsOfRank work{{tiling, args.x, underflow_floor(args.eps)}, args};
    run(tiling, work, problem.elements(), block_bytes);
  });
}

void normalize(const NormalizeArgs& args) { normalize_given(args, {}, 2); }

void grad_input(const GradInputArgs& args) {
  const Problem problem = normal_form(args.problem);
  Coefficients scale(problem), mean_g(problem), slope(problem);
  for (int64_t c = 0; c < problem.channels; ++c) {
    const double invstd = read(args.invstd, c);
    const Partial total = combine_grad_sums(args.rows, problem.channels, c);
    write(scale.space(), c, invstd * read_or(args.weight, c, 1));
    write(mean_g.space(), c, total.first / *args.count);
    write(slope.space(), c, invstd * (total.second / *args.count));
  }
  const GradientVectors vectors{args.mean.data, scale.data(), mean_g.data(), slope.data(), {}};
  with_tiling(problem, 3, false, [&](const Tiling& tiling, int64_t) {
    run_apply(tiling, problem.elements(), [&](int64_t block, int64_t split) {
      tiling.gradient(args.grad_y, args.x, args.grad_x, vectors, block, split);
    });
  });
}

}  // namespace bnk::cpu
