// Joining what the ranks of a batch have told (../problem_sync.h), one channel at a time, in the order of the ranks.
#pragma once

#include "../core/problem_sync.h"
#include "kernels.h"

namespace bnk::cpu {

// A channel's mean and squares about it; `count`: of all its elements, 0 where no rank had any.
Partial combine_welford(const RankRows& rows, int64_t channels, int64_t channel, double* count);

// A channel's sums.
Partial combine_grad_sums(const RankRows& rows, int64_t channels, int64_t channel);

}  // namespace bnk::cpu
