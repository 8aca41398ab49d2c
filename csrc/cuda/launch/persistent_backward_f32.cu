// Persistent backward kernels for float.
#include "instantiate.h"

template bnk::Kernel<bnk::PersistentBackwardParams> bnk::persistent_backward_of<float>(bnk::Layout, bool);
