// The two paths' launches; backend.cpp chooses. Internal to this folder.
#pragma once

#include "backend.h"

namespace bnk::cuda {

// Whether plans may take every row for aligned: see plan_streaming.
bool is_aligned(const void* data);

namespace streaming_path {
int64_t scratch_bytes(const StreamingPlan& plan, Pass pass);
cudaError_t forward_train(const ForwardTrainArgs& args, const StreamingPlan& plan, void* scratch, cudaStream_t stream);
cudaError_t forward_eval(const ForwardEvalArgs& args, const StreamingPlan& plan, cudaStream_t stream);
cudaError_t backward(const BackwardArgs& args, const StreamingPlan& plan, void* scratch, cudaStream_t stream);
}  // namespace streaming_path

namespace resident_path {
int64_t scratch_bytes(const ResidentPlan& plan, Pass pass);
bool needs_barrier_workspace(const ResidentPlan& plan, bool cumulative);
// Whether the kernels hold code for clusters: they were compiled for sm_90 or newer, as PTX and as machine code.
cudaError_t has_cluster_code(bool* has);
// Groups of the plan's kernel that the current device holds at a time; 0 if it cannot launch such groups.
cudaError_t groups_at_once(Dtype dtype, Pass pass, bool fused, const ResidentPlan& plan, int* groups);
cudaError_t forward_train(const ForwardTrainArgs& args, const ResidentPlan& plan, void* scratch,
                          void* barrier_workspace, cudaStream_t stream);
cudaError_t backward(const BackwardArgs& args, const ResidentPlan& plan, void* scratch, void* barrier_workspace,
                     cudaStream_t stream);
}  // namespace resident_path

namespace sync {
int64_t statistics_scratch(const StreamingPlan& plan);
int64_t grad_sums_scratch(const StreamingPlan& plan);
int64_t grad_input_scratch(const StreamingPlan& plan);
cudaError_t statistics(const StatisticsArgs& args, const StreamingPlan& plan, void* scratch, cudaStream_t stream);
cudaError_t normalize(const NormalizeArgs& args, const StreamingPlan& plan, cudaStream_t stream);
cudaError_t grad_sums(const GradSumsArgs& args, const StreamingPlan& plan, void* scratch, cudaStream_t stream);
cudaError_t grad_input(const GradInputArgs& args, const StreamingPlan& plan, void* scratch, cudaStream_t stream);
}  // namespace sync

}  // namespace bnk::cuda
