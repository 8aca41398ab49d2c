// Persistent forward kernels for bfloat16.
#include "instantiate.h"

template bnk::Kernel<bnk::PersistentForwardParams> bnk::persistent_forward_of<bnk::BFloat16>(bnk::Layout, bool);
