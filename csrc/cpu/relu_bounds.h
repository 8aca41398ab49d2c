// What the backward of a ReLU asks of the forward, for each channel (../relu_bounds.h).
#pragma once

#include "../core/problem.h"
#include "kernels.h"

namespace bnk::cpu {

// Of the coefficients that y was computed with; nothing where the epilogue has no place for it.
void write_relu_bounds(const Epilogue& epilogue, const Problem& problem, const AffineVectors& affine);

}  // namespace bnk::cpu
