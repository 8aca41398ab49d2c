// The resident path's backward kernels of bfloat16.
#include "../paths/instantiate.h"

template bnk::Kernel<bnk::ResidentBackwardParams> bnk::resident_backward_of<bnk::BFloat16>(bnk::Layout, bool);
