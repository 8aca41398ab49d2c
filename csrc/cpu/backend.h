// The CPU backend's three entry points. Arguments were checked by ops.cpp; every pointer is host memory.
#pragma once

#include "../problem.h"

namespace bnk::cpu {

void forward_train(const ForwardTrainArgs& args);
void forward_eval(const ForwardEvalArgs& args);
void backward(const BackwardArgs& args);

// The SIMD level chosen at run time: "avx512", "avx2" or "baseline".
const char* simd_level();

}  // namespace bnk::cpu
