// The resident path's forward kernels of float16.
#include "../paths/instantiate.h"

template bnk::Kernel<bnk::ResidentForwardParams> bnk::resident_forward_of<bnk::Half>(bnk::Layout, bool);
