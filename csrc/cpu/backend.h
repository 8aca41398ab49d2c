// Entry points of the CPU backend. csrc/torch/ops.cpp has checked the arguments; every pointer is host memory.
#pragma once

#include "../core/problem.h"
#include "../core/problem_sync.h"

namespace bnk::cpu {

void forward_train(const ForwardTrainArgs& args);
void forward_eval(const ForwardEvalArgs& args);
void backward(const BackwardArgs& args);

// The steps of a synchronized batch norm across ranks (problem_sync.h).
void statistics(const StatisticsArgs& args);
void combine_statistics(const CombineStatisticsArgs& args);
void normalize(const NormalizeArgs& args);
void grad_sums(const GradSumsArgs& args);
void grad_input(const GradInputArgs& args);

// The SIMD level chosen at run time: "avx512", "avx2" or "baseline".
const char* simd_level();

}  // namespace bnk::cpu
