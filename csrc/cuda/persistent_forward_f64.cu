// The resident path's forward kernels of double.
#include "../paths/instantiate.h"

template bnk::Kernel<bnk::ResidentForwardParams> bnk::resident_forward_of<double>(bnk::Layout, bool);
