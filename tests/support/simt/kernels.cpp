// The kernels of one element type, SIMT_ELEMENT. SIMT_ABSENT replaces them with null pointers, for programs that only
// run the kernels of other types.
#ifndef SIMT_ABSENT

#include "cuda/launch/instantiate.h"

#else

#include "cuda/launch/kernels.h"

#define SIMT_NO_KERNEL(Params, name, ...)           \
  template <typename T>                             \
  bnk::Kernel<bnk::Params> bnk::name(__VA_ARGS__) { \
    return nullptr;                                 \
  }

SIMT_NO_KERNEL(PersistentForwardParams, persistent_forward_of, Layout, bool)
SIMT_NO_KERNEL(PersistentBackwardParams, persistent_backward_of, Layout, bool)
SIMT_NO_KERNEL(StatisticsParams, statistics_of, Layout)
SIMT_NO_KERNEL(NormalizeParams, normalize_of, Layout, bool)
SIMT_NO_KERNEL(GradSumsParams, grad_sums_of, Layout, bool)
SIMT_NO_KERNEL(GradInputParams, grad_input_of, Layout, bool)

#endif

namespace bnk {

template Kernel<PersistentForwardParams> persistent_forward_of<SIMT_ELEMENT>(Layout, bool);
template Kernel<PersistentBackwardParams> persistent_backward_of<SIMT_ELEMENT>(Layout, bool);
template Kernel<StatisticsParams> statistics_of<SIMT_ELEMENT>(Layout);
template Kernel<NormalizeParams> normalize_of<SIMT_ELEMENT>(Layout, bool);
template Kernel<GradSumsParams> grad_sums_of<SIMT_ELEMENT>(Layout, bool);
template Kernel<GradInputParams> grad_input_of<SIMT_ELEMENT>(Layout, bool);

}  // namespace bnk
