// Persistent backward kernels for float16.
#include "instantiate.h"

template bnk::Kernel<bnk::PersistentBackwardParams> bnk::persistent_backward_of<bnk::Half>(bnk::Layout, bool);
