// The kernels of one element type, SIMT_ELEMENT. With SIMT_ABSENT, null pointers in their place, for programs that run the
// kernels of another type alone.
#ifndef SIMT_ABSENT

#include "paths/instantiate.h"

#else

#include "paths/kernels.h"

namespace bnk {

template <typename T>
Kernel<ResidentForwardParams> resident_forward_of(Layout, bool) {
  return nullptr;
}

template <typename T>
Kernel<ResidentBackwardParams> resident_backward_of(Layout, bool) {
  return nullptr;
}

template <typename T>
Kernel<StatisticsParams> statistics_of(Layout) {
  return nullptr;
}

template <typename T>
Kernel<NormalizeParams> normalize_of(Layout, bool) {
  return nullptr;
}

template <typename T>
Kernel<GradSumsParams> grad_sums_of(Layout, bool) {
  return nullptr;
}

template <typename T>
Kernel<GradInputParams> grad_input_of(Layout, bool) {
  return nullptr;
}

}  // namespace bnk

#endif

namespace bnk {

template Kernel<ResidentForwardParams> resident_forward_of<SIMT_ELEMENT>(Layout, bool);
template Kernel<ResidentBackwardParams> resident_backward_of<SIMT_ELEMENT>(Layout, bool);
template Kernel<StatisticsParams> statistics_of<SIMT_ELEMENT>(Layout);
template Kernel<NormalizeParams> normalize_of<SIMT_ELEMENT>(Layout, bool);
template Kernel<GradSumsParams> grad_sums_of<SIMT_ELEMENT>(Layout, bool);
template Kernel<GradInputParams> grad_input_of<SIMT_ELEMENT>(Layout, bool);

}  // namespace bnk
