// Launches of the two-pass path, whole and in the steps between which ranks exchange: both are made of the same kernels.
// Those that are templates are compiled in two_pass_*.cu.
#include "launchers.h"
#include "sync.h"
#include "two_pass.h"

namespace bnk::cuda {
namespace {

class StreamExecutor {
 public:
  explicit StreamExecutor(cudaStream_t stream) : stream_(stream) {}

  // After an error nothing more is launched: later kernels would read what was never written.
  template <typename Params>
  void launch(Launch launch, void (*kernel)(Params), const Params& params) {
    if (error_ != cudaSuccess) return;
    kernel<<<static_cast<unsigned>(launch.grid), launch.block, 0, stream_>>>(params);
    error_ = cudaGetLastError();
  }

  cudaError_t error() const { return error_; }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace

bool is_aligned(const void* data) { return two_pass::is_aligned(data); }

namespace two_pass_path {

int64_t scratch_bytes(const TwoPassPlan& plan, Pass pass) {
  if (pass == Pass::kForwardEval) return 0;
  const int64_t doubles =
      pass == Pass::kForwardTrain ? two_pass::forward_train_scratch(plan) : two_pass::backward_scratch(plan);
  return doubles * static_cast<int64_t>(sizeof(double));
}

cudaError_t forward_train(const ForwardTrainArgs& args, const TwoPassPlan& plan, void* scratch, cudaStream_t stream) {
  StreamExecutor executor(stream);
  two_pass::forward_train(args, plan, static_cast<double*>(scratch), executor);
  return executor.error();
}

cudaError_t forward_eval(const ForwardEvalArgs& args, const TwoPassPlan& plan, cudaStream_t stream) {
  StreamExecutor executor(stream);
  two_pass::forward_eval(args, plan, executor);
  return executor.error();
}

cudaError_t backward(const BackwardArgs& args, const TwoPassPlan& plan, void* scratch, cudaStream_t stream) {
  StreamExecutor executor(stream);
  two_pass::backward(args, plan, static_cast<double*>(scratch), executor);
  return executor.error();
}

}  // namespace two_pass_path

namespace sync {
namespace {

int64_t bytes_of(int64_t doubles) { return doubles * static_cast<int64_t>(sizeof(double)); }

}  // namespace

int64_t statistics_scratch(const TwoPassPlan& plan) { return bytes_of(bnk::sync::statistics_scratch(plan)); }
int64_t grad_sums_scratch(const TwoPassPlan& plan) { return bytes_of(bnk::sync::grad_sums_scratch(plan)); }
int64_t grad_input_scratch(const TwoPassPlan& plan) { return bytes_of(bnk::sync::grad_input_scratch(plan)); }

cudaError_t statistics(const StatisticsArgs& args, const TwoPassPlan& plan, void* scratch, cudaStream_t stream) {
  StreamExecutor executor(stream);
  bnk::sync::statistics(args, plan, static_cast<double*>(scratch), executor);
  return executor.error();
}

cudaError_t combine_statistics(const CombineStatisticsArgs& args, cudaStream_t stream) {
  StreamExecutor executor(stream);
  bnk::sync::combine_statistics(args, plan_combine(args.channels), executor);
  return executor.error();
}

cudaError_t normalize(const NormalizeArgs& args, const TwoPassPlan& plan, cudaStream_t stream) {
  StreamExecutor executor(stream);
  bnk::sync::normalize(args, plan, executor);
  return executor.error();
}

cudaError_t grad_sums(const GradSumsArgs& args, const TwoPassPlan& plan, void* scratch, cudaStream_t stream) {
  StreamExecutor executor(stream);
  bnk::sync::grad_sums(args, plan, static_cast<double*>(scratch), executor);
  return executor.error();
}

cudaError_t grad_input(const GradInputArgs& args, const TwoPassPlan& plan, void* scratch, cudaStream_t stream) {
  StreamExecutor executor(stream);
  const Launch combine = plan_combine(grad_sums_row(args.problem.channels));
  bnk::sync::grad_input(args, plan, combine, static_cast<double*>(scratch), executor);
  return executor.error();
}

}  // namespace sync
}  // namespace bnk::cuda
