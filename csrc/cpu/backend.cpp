// The CPU backend's entry points: Ioffe & Szegedy 2015, Algorithms 1 and 2, and their gradients.
//
// Here is what is computed for a channel: its statistics, its running statistics, its coefficients, all in double and
// rounded once. How a problem is cut is layout.h's; who computes a piece is schedule.h's; the loops are kernels.h's.
#include "backend.h"

#include <cmath>

#include "layout.h"
#include "ranks.h"
#include "relu_bounds.h"
#include "schedule.h"
#include "simd/scalar.h"

namespace bnk::cpu {
namespace {

constexpr int64_t kMinRun = 32;          // elements; shorter runs are taken as columns
constexpr int64_t kInPlaceValues = 256;  // by-channel vectors up to this length need no heap

// A vector by channel in the arithmetic type: the caller's own where it is that already, else a converted copy.
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
  // Uninitialised, to be written through space().
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

// Channels-first in the widest form: one channel is one run, whatever the outer size.
Problem normal_form(Problem problem) {
  if (problem.channels == 1) {
    problem.inner *= problem.outer;
    problem.outer = 1;
  }
  return problem;
}

// Calls f(layout, bytes of a block) with the layout of the problem. `tensors`: how many of its size should be in the cache
// together. Where there are statistics, in this call or one before it, these are all that are read and written; otherwise
// the result alone, as nothing else is used again.
template <typename F>
void with_layout(const Problem& problem, int tensors, bool has_partials, const F& f) {
  const int64_t channel_bytes = problem.elements_per_channel() * size_of(problem.dtype) * tensors;
  if (problem.inner >= kMinRun || problem.channels == 1) {
    const Rows rows(problem, tensors, has_partials);
    return f(static_cast<const Layout&>(rows), channel_bytes * rows.block_channels());
  }
  const Columns columns(problem, tensors, has_partials, threads_for(problem.elements()));
  f(static_cast<const Layout&>(columns), channel_bytes * columns.block_channels());
}

// An element's share in a sum of squares under which float's underflow would count beside eps: none for any usual eps.
double underflow_floor(double eps) { return eps < 1e-36 ? 1e-30 : 0; }

// Mean and sum of squared deviations of x.
struct MomentsOf {
  const Layout& layout;
  const void* x;
  double floor;

  void partials(int64_t block, int64_t split, Partial* out) const { layout.welford(x, floor, block, split, out); }
  void merge(Partial* into, double before, const Partial& from, double count) const {
    combine_welford(into, before, from, count);
  }
};

template <typename Args>
NormalizeData data_of(const Args& args, const Epilogue& epilogue) {
  return {args.x, epilogue.residual, args.y, epilogue.relu};
}

struct TrainForward : MomentsOf {
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
    layout.normalize(data_of(args, args.epilogue), affine, block, split);
  }
};

struct Backward {
  const BackwardArgs& args;
  const Layout& layout;
  GradientVectors vectors;
  PerChannel mean_g, slope;
  double n;
  bool has_apply;

  void partials(int64_t block, int64_t split, Partial* out) const {
    layout.sums(args.grad_y, args.x, {args.mean.data, args.invstd.data, vectors.relu_bounds}, block, split, out);
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
    layout.gradient(args.grad_y, args.x, args.grad_x, vectors, block, split);
  }
};

// y from the mean and invstd that are there. `tensors`: see with_layout.
template <typename Args>
void normalize_given(const Args& args, const Epilogue& epilogue, int tensors) {
  const Problem problem = normal_form(args.problem);
  const Coefficients weight(args.weight, 1, problem);
  const Coefficients bias(args.bias, 0, problem);
  const AffineVectors affine{args.mean.data, args.invstd.data, weight.data(), bias.data()};
  with_layout(problem, tensors, false, [&](const Layout& layout, int64_t) {
    run_apply(layout, problem.elements(),
              [&](int64_t block, int64_t split) { layout.normalize(data_of(args, epilogue), affine, block, split); });
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
  with_layout(problem, tensors, true, [&](const Layout& layout, int64_t block_bytes) {
    const TrainForward work{{layout, args.x, underflow_floor(args.eps)},
                            args,
                            affine,
                            factor,
                            static_cast<double>(problem.elements_per_channel())};
    run(layout, work, problem.elements(), block_bytes);
  });
  write_relu_bounds(args.epilogue, problem, affine);
  if (args.num_batches_tracked != nullptr)
    *args.num_batches_tracked = count;  // last: a call that throws counts nothing
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
  with_layout(problem, has_partials ? 3 : 1, has_partials, [&](const Layout& layout, int64_t block_bytes) {
    const Backward work{args,           layout,        vectors,
                        mean_g.space(), slope.space(), static_cast<double>(problem.elements_per_channel()),
                        has_apply};
    if (has_partials) {
      run(layout, work, problem.elements(), block_bytes);
    } else {
      run_apply(layout, problem.elements(), [&](int64_t block, int64_t split) { work.apply(block, split); });
    }
  });
}

// The steps of a batch on several ranks. What joins ranks, and needs no layout, is in ranks.cpp.

namespace {

struct StatisticsOfRank : MomentsOf {
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
  with_layout(problem, 1, true, [&](const Layout& layout, int64_t block_bytes) {
    const StatisticsOfRank work{{layout, args.x, underflow_floor(args.eps)}, args};
    run(layout, work, problem.elements(), block_bytes);
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
  with_layout(problem, 3, false, [&](const Layout& layout, int64_t) {
    run_apply(layout, problem.elements(), [&](int64_t block, int64_t split) {
      layout.gradient(args.grad_y, args.x, args.grad_x, vectors, block, split);
    });
  });
}

}  // namespace bnk::cpu
