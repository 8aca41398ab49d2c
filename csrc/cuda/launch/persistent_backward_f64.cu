// Persistent backward kernels for double.
#include "instantiate.h"

template bnk::Kernel<bnk::PersistentBackwardParams> bnk::persistent_backward_of<double>(bnk::Layout, bool);
