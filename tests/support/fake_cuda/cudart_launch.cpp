// Runtime API: registration of kernels when a library is loaded, function attributes, occupancy and launches.
#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "fake_cuda/kernels.h"
#include "fake_cuda/state.h"
#include "fake_cuda/work.h"

using namespace fake_cuda;  // NOLINT: this file is a part of fake_cuda

namespace {

constexpr int kDefaultDynamicBytes = 48 << 10;  // of shared memory, unless a kernel opts in to more

struct Function {
  std::string name;  // mangled
  int dynamic_bytes[kDevices];
};

// By the address of the host function that represents the kernel.
std::map<const void*, Function>& functions() {
  static std::map<const void*, Function>& all = *new std::map<const void*, Function>;
  return all;
}

struct Call {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Call> calls;  // between <<<...>>> and the stub function that it calls

int64_t shared_of_block(size_t dynamic) { return static_cast<int64_t>(dynamic) + limits().shared_reserved; }

// Occupancy by threads, blocks and dynamic shared memory. Only nvcc knows a kernel's registers and static shared
// memory.
int blocks_per_multiprocessor(int threads, size_t dynamic) {
  const bnk::DeviceLimits& has = limits();
  const int64_t by_shared = has.shared_per_multiprocessor / shared_of_block(dynamic);
  return static_cast<int>(std::min<int64_t>(
      {has.max_threads_per_multiprocessor / threads, max_blocks_per_multiprocessor_limit(), by_shared}));
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, size_t dynamic, cudaStream_t stream, unsigned cluster,
                   bool cooperative, void** arguments) {
  const auto found = functions().find(function);
  if (found == functions().end()) return result(cudaErrorInvalidDeviceFunction);
  const Kernel* kernel = find_kernel(found->second.name);
  if (kernel == nullptr) return unsupported("no kernel of bnkernels: " + found->second.name);
  const int device = current_device();
  if (grid.x == 0 || grid.y != 1 || grid.z != 1 || block.x == 0 || block.x > 1024 || block.y != 1 || block.z != 1) {
    return result(cudaErrorInvalidConfiguration);
  }
  if (dynamic > static_cast<size_t>(found->second.dynamic_bytes[device])) return result(cudaErrorInvalidValue);
  if (cluster > static_cast<unsigned>(std::max(limits().max_cluster, 1)) || grid.x % cluster != 0) {
    return result(cudaErrorInvalidClusterSize);
  }
  if (cluster > 1 && refuses("clusters")) return result(cudaErrorInvalidClusterSize);
  if (cluster > 1 && ptx_version() < 90) return unsupported("a cluster of a kernel that has no code for clusters");
  if (dynamic > 0 && refuses("resources")) return result(cudaErrorLaunchOutOfResources);
  const int together = blocks_per_multiprocessor(static_cast<int>(block.x), dynamic) * limits().multiprocessors;
  if (cooperative && (grid.x > static_cast<unsigned>(together) || refuses("cooperative"))) {
    return result(cudaErrorCooperativeLaunchTooLarge);
  }
  const Geometry geometry{grid.x, block.x, cluster, dynamic, cooperative};
  const auto* first = static_cast<const char*>(arguments[0]);
  return result(enqueue(stream, {found->second.name, device,
                                 [name = found->second.name, kernel, geometry, device,
                                  argument = std::vector<char>(first, first + kernel->argument_bytes)] {
                                   run_kernel(name, *kernel, geometry, device, argument.data());
                                 }}));
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  Function entry{name, {}};
  std::fill_n(entry.dynamic_bytes, kDevices, kDefaultDynamicBytes);
  functions()[function] = entry;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  calls.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (calls.empty()) return result(cudaErrorMissingConfiguration);
  *grid = calls.back().grid;
  *block = calls.back().block;
  *shared = calls.back().shared;
  *static_cast<cudaStream_t*>(stream) = calls.back().stream;
  calls.pop_back();
  return result(cudaSuccess);
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  return launch(function, grid, block, shared, stream, 1, false, arguments);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  unsigned cluster = 1;
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      cluster = attribute.val.clusterDim.x;
    } else if (attribute.id == cudaLaunchAttributeCooperative) {
      cooperative = attribute.val.cooperative != 0;
    } else {
      return unsupported("launch attribute " + std::to_string(attribute.id));
    }
  }
  return launch(function, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream, cluster,
                cooperative, arguments);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  const auto found = functions().find(function);
  if (found == functions().end()) return result(cudaErrorInvalidDeviceFunction);
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->maxDynamicSharedSizeBytes = found->second.dynamic_bytes[current_device()];
  attributes->binaryVersion = 90;
  attributes->ptxVersion = ptx_version();
  return result(cudaSuccess);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const auto found = functions().find(function);
  if (found == functions().end()) return result(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > limits().shared_per_block) return result(cudaErrorInvalidValue);
    found->second.dynamic_bytes[current_device()] = value;
  }
  return result(cudaSuccess);
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads,
                                                                   size_t dynamic, unsigned) {
  *blocks = blocks_per_multiprocessor(threads, dynamic);
  return result(cudaSuccess);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t dynamic) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, dynamic, 0);
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  if (refuses("clusters")) return result(cudaErrorInvalidClusterSize);
  unsigned size = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) size = config->attrs[i].val.clusterDim.x;
  }
  const int blocks = blocks_per_multiprocessor(static_cast<int>(config->blockDim.x), config->dynamicSmemBytes) *
                     limits().multiprocessors;
  *clusters = blocks / static_cast<int>(size);
  return result(cudaSuccess);
}

}  // extern "C"
