// Persistent forward kernels for float16.
#include "instantiate.h"

template bnk::Kernel<bnk::PersistentForwardParams> bnk::persistent_forward_of<bnk::Half>(bnk::Layout, bool);
