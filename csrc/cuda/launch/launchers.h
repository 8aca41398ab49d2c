// The two paths' launches; backend.cpp chooses. Internal to this folder.
#pragma once

#include "../backend.h"

namespace bnk::cuda {

// Whether plans may take every row for aligned: see plan_two_pass.
bool is_aligned(const void* data);

namespace two_pass_path {
int64_t scratch_bytes(const TwoPassPlan& plan, Pass pass);
cudaError_t forward_train(const ForwardTrainArgs& args, const TwoPassPlan& plan, void* scratch, cudaStream_t stream);
cudaError_t forward_eval(const ForwardEvalArgs& args, const TwoPassPlan& plan, cudaStream_t stream);
cudaError_t backward(const BackwardArgs& args, const TwoPassPlan& plan, void* scratch, cudaStream_t stream);
}  // namespace two_pass_path

namespace persistent_path {
int64_t scratch_bytes(const PersistentPlan& plan, Pass pass);
bool needs_barrier_workspace(const PersistentPlan& plan, bool cumulative);
// Whether the kernels hold code for clusters: they were compiled for sm_90 or newer, as PTX and as machine code.
cudaError_t has_cluster_code(bool* has);
// Groups of the plan's kernel that the current device holds at a time; 0 if it cannot launch such groups.
cudaError_t groups_at_once(Dtype dtype, Pass pass, bool has_epilogue, const PersistentPlan& plan, int* groups);
cudaError_t forward_train(const ForwardTrainArgs& args, const PersistentPlan& plan, void* scratch,
                          void* barrier_workspace, cudaStream_t stream);
cudaError_t backward(const BackwardArgs& args, const PersistentPlan& plan, void* scratch, void* barrier_workspace,
                     cudaStream_t stream);
}  // namespace persistent_path

namespace sync {
int64_t statistics_scratch(const TwoPassPlan& plan);
int64_t grad_sums_scratch(const TwoPassPlan& plan);
int64_t grad_input_scratch(const TwoPassPlan& plan);
cudaError_t statistics(const StatisticsArgs& args, const TwoPassPlan& plan, void* scratch, cudaStream_t stream);
cudaError_t normalize(const NormalizeArgs& args, const TwoPassPlan& plan, cudaStream_t stream);
cudaError_t grad_sums(const GradSumsArgs& args, const TwoPassPlan& plan, void* scratch, cudaStream_t stream);
cudaError_t grad_input(const GradInputArgs& args, const TwoPassPlan& plan, void* scratch, cudaStream_t stream);
}  // namespace sync

}  // namespace bnk::cuda
