// The resident path's backward kernels of float.
#include "../paths/instantiate.h"

template bnk::Kernel<bnk::ResidentBackwardParams> bnk::resident_backward_of<float>(bnk::Layout, bool);
