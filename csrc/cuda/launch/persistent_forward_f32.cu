// Persistent forward kernels for float.
#include "instantiate.h"

template bnk::Kernel<bnk::PersistentForwardParams> bnk::persistent_forward_of<float>(bnk::Layout, bool);
