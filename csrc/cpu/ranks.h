// Combines the rows that the ranks exchanged (../core/problem_sync.h), one channel per call, in rank order.
#pragma once

#include "../core/problem_sync.h"
#include "kernels.h"

namespace bnk::cpu {

// A channel's mean and sum of squared deviations. `count` receives the number of its elements on all ranks, which may
// be 0.
Partial combine_welford(const RankRows& rows, int64_t channels, int64_t channel, double* count);

// A channel's sums over all ranks.
Partial combine_grad_sums(const RankRows& rows, int64_t channels, int64_t channel);

}  // namespace bnk::cpu
