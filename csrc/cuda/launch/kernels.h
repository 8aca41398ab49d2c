// The kernels of an element type, by what is known at run time. Declared here for the launch sequences, defined in
// instantiate.h: so that csrc/cuda compiles each element type in a translation unit of its own.
#pragma once

#include "../kernels/grad_input.cuh"
#include "../kernels/grad_sums.cuh"
#include "../kernels/normalize.cuh"
#include "../kernels/persistent_backward.cuh"
#include "../kernels/persistent_forward.cuh"
#include "../kernels/statistics.cuh"

namespace bnk {

template <typename Params>
using Kernel = void (*)(Params);

// fused: with an epilogue. gated: behind a ReLU.
template <typename T>
Kernel<PersistentForwardParams> persistent_forward_of(Layout layout, bool has_epilogue);
template <typename T>
Kernel<PersistentBackwardParams> persistent_backward_of(Layout layout, bool has_relu);

// Layout::kPacked is for the persistent kernel alone.
template <typename T>
Kernel<StatisticsParams> statistics_of(Layout layout);
template <typename T>
Kernel<NormalizeParams> normalize_of(Layout layout, bool has_epilogue);
template <typename T>
Kernel<GradSumsParams> grad_sums_of(Layout layout, bool has_relu);
template <typename T>
Kernel<GradInputParams> grad_input_of(Layout layout, bool has_relu);

}  // namespace bnk
