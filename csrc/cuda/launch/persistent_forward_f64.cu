// Persistent forward kernels for double.
#include "instantiate.h"

template bnk::Kernel<bnk::PersistentForwardParams> bnk::persistent_forward_of<double>(bnk::Layout, bool);
