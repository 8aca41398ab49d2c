// The part of the driver API that torch uses. This library has the name under which torch opens the driver
// (libcuda.so.1).
#include <cuda.h>

#include "fake_cuda/state.h"

extern "C" {

// Whether a device is already in use; torch calls it before a thread's first work on the device.
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

}  // extern "C"
