// The resident path's forward kernels of float.
#include "../paths/instantiate.h"

template bnk::Kernel<bnk::ResidentForwardParams> bnk::resident_forward_of<float>(bnk::Layout, bool);
