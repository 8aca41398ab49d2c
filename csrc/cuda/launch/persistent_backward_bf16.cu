// Persistent backward kernels for bfloat16.
#include "instantiate.h"

template bnk::Kernel<bnk::PersistentBackwardParams> bnk::persistent_backward_of<bnk::BFloat16>(bnk::Layout, bool);
