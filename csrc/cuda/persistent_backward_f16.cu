// The resident path's backward kernels of float16.
#include "../paths/instantiate.h"

template bnk::Kernel<bnk::ResidentBackwardParams> bnk::resident_backward_of<bnk::Half>(bnk::Layout, bool);
