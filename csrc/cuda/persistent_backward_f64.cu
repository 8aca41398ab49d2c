// The resident path's backward kernels of double.
#include "../paths/instantiate.h"

template bnk::Kernel<bnk::ResidentBackwardParams> bnk::resident_backward_of<double>(bnk::Layout, bool);
