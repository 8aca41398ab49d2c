// The kernels of each element type, selected by run-time arguments. Declared here for the launch sequences and defined
// in instantiate.h, so that csrc/cuda compiles each element type in its own translation unit.
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

// has_epilogue: Epilogue::enabled(). has_relu: the forward ended with a ReLU.
template <typename T>
Kernel<PersistentForwardParams> persistent_forward_of(Layout layout, bool has_epilogue);
template <typename T>
Kernel<PersistentBackwardParams> persistent_backward_of(Layout layout, bool has_relu);

// Layout::kPacked is supported by the persistent kernel only.
template <typename T>
Kernel<StatisticsParams> statistics_of(Layout layout);
template <typename T>
Kernel<NormalizeParams> normalize_of(Layout layout, bool has_epilogue);
template <typename T>
Kernel<GradSumsParams> grad_sums_of(Layout layout, bool has_relu);
template <typename T>
Kernel<GradInputParams> grad_input_of(Layout layout, bool has_relu);

}  // namespace bnk
