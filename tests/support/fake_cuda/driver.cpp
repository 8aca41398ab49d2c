// What torch asks of the driver below the runtime: the library has the driver's name (libcuda.so.1), by which torch opens it.
#include <cuda.h>

#include "fake_cuda/state.h"

extern "C" {

// Whether a device is in use already: asked before a thread's first work on it.
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

}  // extern "C"
