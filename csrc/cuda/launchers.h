// The two paths' launches; backend.cpp chooses. Internal to this folder.
#pragma once

#include "backend.h"

namespace bnk::cuda {

namespace streaming_path {
int64_t scratch_bytes(const StreamingPlan& plan, Pass pass);
cudaError_t forward_train(const ForwardTrainArgs& args, const StreamingPlan& plan, void* scratch, cudaStream_t stream);
cudaError_t forward_eval(const ForwardEvalArgs& args, const StreamingPlan& plan, cudaStream_t stream);
cudaError_t backward(const BackwardArgs& args, const StreamingPlan& plan, void* scratch, cudaStream_t stream);
}  // namespace streaming_path

namespace resident_path {
int64_t scratch_bytes(const ResidentPlan& plan, Pass pass);
int64_t counters(const ResidentPlan& plan);
// Groups of the plan's kernel that the current device holds at a time.
cudaError_t groups_at_once(Dtype dtype, Pass pass, bool fused, const ResidentPlan& plan, int* groups);
cudaError_t forward_train(const ForwardTrainArgs& args, const ResidentPlan& plan, void* scratch, unsigned* counters,
                          cudaStream_t stream);
cudaError_t backward(const BackwardArgs& args, const ResidentPlan& plan, void* scratch, unsigned* counters,
                     cudaStream_t stream);
}  // namespace resident_path

}  // namespace bnk::cuda
