// The persistent kernel's forward kernels of float.
#include "instantiate.h"

template bnk::Kernel<bnk::PersistentForwardParams> bnk::persistent_forward_of<float>(bnk::Layout, bool);
