// The resident path's forward kernels of bfloat16.
#include "../paths/instantiate.h"

template bnk::Kernel<bnk::ResidentForwardParams> bnk::resident_forward_of<bnk::BFloat16>(bnk::Layout, bool);
