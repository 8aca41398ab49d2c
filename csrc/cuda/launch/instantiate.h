// Definitions of the functions declared in kernels.h.
#pragma once

#include "dispatch.h"
#include "kernels.h"

namespace bnk {

template <typename T>
Kernel<PersistentForwardParams> persistent_forward_of(Layout layout, bool has_epilogue) {
  return with_layout(layout, [&](auto layout_tag) {
    return with_flag(has_epilogue, [&](auto flag) -> Kernel<PersistentForwardParams> {
      return persistent_forward_kernel<T, decltype(layout_tag)::value, decltype(flag)::value>;
    });
  });
}

template <typename T>
Kernel<PersistentBackwardParams> persistent_backward_of(Layout layout, bool has_relu) {
  return with_layout(layout, [&](auto layout_tag) {
    return with_flag(has_relu, [&](auto flag) -> Kernel<PersistentBackwardParams> {
      return persistent_backward_kernel<T, decltype(layout_tag)::value, decltype(flag)::value>;
    });
  });
}

template <typename T>
Kernel<StatisticsParams> statistics_of(Layout layout) {
  return with_unpacked_layout(layout, [](auto layout_tag) -> Kernel<StatisticsParams> {
    return statistics_kernel<T, decltype(layout_tag)::value>;
  });
}

template <typename T>
Kernel<NormalizeParams> normalize_of(Layout layout, bool has_epilogue) {
  return with_unpacked_layout(layout, [&](auto layout_tag) {
    return with_flag(has_epilogue, [&](auto flag) -> Kernel<NormalizeParams> {
      return normalize_kernel<T, decltype(layout_tag)::value, decltype(flag)::value>;
    });
  });
}

template <typename T>
Kernel<GradSumsParams> grad_sums_of(Layout layout, bool has_relu) {
  return with_unpacked_layout(layout, [&](auto layout_tag) {
    return with_flag(has_relu, [&](auto flag) -> Kernel<GradSumsParams> {
      return grad_sums_kernel<T, decltype(layout_tag)::value, decltype(flag)::value>;
    });
  });
}

template <typename T>
Kernel<GradInputParams> grad_input_of(Layout layout, bool has_relu) {
  return with_unpacked_layout(layout, [&](auto layout_tag) {
    return with_flag(has_relu, [&](auto flag) -> Kernel<GradInputParams> {
      return grad_input_kernel<T, decltype(layout_tag)::value, decltype(flag)::value>;
    });
  });
}

}  // namespace bnk
