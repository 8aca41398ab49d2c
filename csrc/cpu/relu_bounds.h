// The per-channel ReLU bounds that the forward saves for the backward (../core/relu_bounds.h).
#pragma once

#include "../core/problem.h"
#include "kernels.h"

namespace bnk::cpu {

// Computes the bounds from the coefficients that y was computed with. Does nothing if epilogue.low is null.
void write_relu_bounds(const Epilogue& epilogue, const Problem& problem, const AffineVectors& affine);

}  // namespace bnk::cpu
