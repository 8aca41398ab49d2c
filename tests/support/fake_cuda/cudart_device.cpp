// Runtime API: devices and errors.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "fake_cuda/memory.h"
#include "fake_cuda/state.h"

using namespace fake_cuda;  // NOLINT: this file is a part of fake_cuda

namespace {

constexpr int kRegisters = 65536;
constexpr int kCapability[] = {9, 0};

bool is_device(int device) { return device >= 0 && device < kDevices; }

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return result(cudaSuccess);
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device();
  return result(cudaSuccess);
}

cudaError_t cudaSetDevice(int device) {
  if (!is_device(device)) return result(cudaErrorInvalidDevice);
  set_current_device(device);
  return result(cudaSuccess);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (!is_device(device)) return result(cudaErrorInvalidDevice);
  const bnk::DeviceLimits& has = limits();
  cudaDeviceProp all{};
  std::snprintf(all.name, sizeof all.name, "fake CUDA device");
  all.uuid.bytes[0] = static_cast<char>(device);
  all.major = kCapability[0];
  all.minor = kCapability[1];
  all.totalGlobalMem = global_memory();
  all.warpSize = 32;
  all.maxThreadsPerBlock = 1024;
  std::fill_n(all.maxThreadsDim, 2, 1024);
  all.maxThreadsDim[2] = 64;
  all.maxGridSize[0] = 0x7fffffff;
  std::fill_n(all.maxGridSize + 1, 2, 65535);
  all.multiProcessorCount = has.multiprocessors;
  all.maxThreadsPerMultiProcessor = has.max_threads_per_multiprocessor;
  all.maxBlocksPerMultiProcessor = has.max_blocks_per_multiprocessor;
  all.regsPerBlock = all.regsPerMultiprocessor = kRegisters;
  all.sharedMemPerBlock = 48 << 10;
  all.sharedMemPerBlockOptin = static_cast<size_t>(has.shared_per_block);
  all.sharedMemPerMultiprocessor = static_cast<size_t>(has.shared_per_multiprocessor);
  all.reservedSharedMemPerBlock = static_cast<size_t>(has.shared_reserved);
  all.cooperativeLaunch = has.cooperative_launch;
  all.clusterLaunch = has.max_cluster > 0;
  all.l2CacheSize = 50 << 20;
  all.memoryBusWidth = 6144;
  all.unifiedAddressing = 1;
  all.pciBusID = device + 1;
  *properties = all;
  return result(cudaSuccess);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!is_device(device)) return result(cudaErrorInvalidDevice);
  const bnk::DeviceLimits& has = limits();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = has.multiprocessors;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = has.max_threads_per_multiprocessor;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = has.max_blocks_per_multiprocessor;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(has.shared_per_multiprocessor);
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(has.shared_per_block);
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = static_cast<int>(has.shared_reserved);
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = has.cooperative_launch;
      break;
    case cudaDevAttrClusterLaunch:
      *value = has.max_cluster > 0;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = kCapability[0];
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = kCapability[1];
      break;
    case cudaDevAttrClockRate:
    case cudaDevAttrMemoryClockRate:
      *value = 1'000'000;  // kHz
      break;
    case cudaDevAttrGlobalMemoryBusWidth:
      *value = 6144;
      break;
    default:
      return unsupported("device attribute " + std::to_string(attribute));
  }
  return result(cudaSuccess);
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return result(cudaSuccess);
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  std::snprintf(text, static_cast<size_t>(length), "0000:%02x:00.0", device + 1);
  return result(cudaSuccess);
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return result(cudaSuccess);
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

// There is no driver.
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  *function = nullptr;
  if (status != nullptr) *status = cudaDriverEntryPointSymbolNotFound;
  return cudaErrorSymbolNotFound;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = global_memory();
  *free = global_memory() - std::min(global_memory(), allocated(current_device()));
  return result(cudaSuccess);
}

cudaError_t cudaProfilerStart() { return result(cudaSuccess); }
cudaError_t cudaProfilerStop() { return result(cudaSuccess); }

cudaError_t cudaGetLastError() { return take_error(); }
cudaError_t cudaPeekAtLastError() { return peek_error(); }

}  // extern "C"
