// The definitions of what kernels.h declares.
#pragma once

#include "dispatch.h"
#include "kernels.h"

namespace bnk {

template <typename T>
Kernel<ResidentForwardParams> resident_forward_of(Layout layout, bool fused) {
  return with_layout(layout, [&](auto layout_tag) {
    return with_flag(fused, [&](auto flag) -> Kernel<ResidentForwardParams> {
      return resident_forward_kernel<T, decltype(layout_tag)::value, decltype(flag)::value>;
    });
  });
}

template <typename T>
Kernel<ResidentBackwardParams> resident_backward_of(Layout layout, bool gated) {
  return with_layout(layout, [&](auto layout_tag) {
    return with_flag(gated, [&](auto flag) -> Kernel<ResidentBackwardParams> {
      return resident_backward_kernel<T, decltype(layout_tag)::value, decltype(flag)::value>;
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
Kernel<NormalizeParams> normalize_of(Layout layout, bool fused) {
  return with_unpacked_layout(layout, [&](auto layout_tag) {
    return with_flag(fused, [&](auto flag) -> Kernel<NormalizeParams> {
      return normalize_kernel<T, decltype(layout_tag)::value, decltype(flag)::value>;
    });
  });
}

template <typename T>
Kernel<GradSumsParams> grad_sums_of(Layout layout, bool gated) {
  return with_unpacked_layout(layout, [&](auto layout_tag) {
    return with_flag(gated, [&](auto flag) -> Kernel<GradSumsParams> {
      return grad_sums_kernel<T, decltype(layout_tag)::value, decltype(flag)::value>;
    });
  });
}

template <typename T>
Kernel<GradInputParams> grad_input_of(Layout layout, bool gated) {
  return with_unpacked_layout(layout, [&](auto layout_tag) {
    return with_flag(gated, [&](auto flag) -> Kernel<GradInputParams> {
      return grad_input_kernel<T, decltype(layout_tag)::value, decltype(flag)::value>;
    });
  });
}

}  // namespace bnk
