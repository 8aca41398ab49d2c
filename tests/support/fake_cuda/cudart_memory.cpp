// Runtime API: memory.
#include <cstring>
#include <vector>

#include "fake_cuda/memory.h"
#include "fake_cuda/state.h"
#include "fake_cuda/work.h"

using namespace fake_cuda;  // NOLINT: this file is a part of fake_cuda

namespace {

// The caller may change pageable host memory as soon as the call returns, so its contents are copied at the call.
cudaError_t enqueue_copy(void* target, const void* source, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  for (const void* memory : {const_cast<const void*>(target), source}) {
    if (device_of(memory) >= 0 && device_of(memory, bytes) < 0) return cudaErrorInvalidValue;  // out of bounds
  }
  if (device_of(source) >= 0 || is_pinned(source)) {
    return enqueue(stream, {"a copy", kAnyDevice, [=] { std::memmove(target, source, bytes); }});
  }
  const auto* first = static_cast<const char*>(source);
  return enqueue(stream, {"a copy", kAnyDevice, [target, kept = std::vector<char>(first, first + bytes)] {
                            std::memcpy(target, kept.data(), kept.size());
                          }});
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (const cudaError_t error = forbid_in_capture("cudaMalloc"); error != cudaSuccess) return result(error);
  const bool fits = bytes <= global_memory() && allocated(current_device()) <= global_memory() - bytes;
  *memory = fits ? allocate(current_device(), bytes) : nullptr;
  return result(*memory != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}

// Waits for the device, as CUDA's does.
cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return result(cudaSuccess);
  if (const cudaError_t error = forbid_in_capture("cudaFree"); error != cudaSuccess) return result(error);
  if (const cudaError_t error = finish_device(); error != cudaSuccess) return result(error);
  return result(deallocate(memory) ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  if (const cudaError_t error = forbid_in_capture("cudaHostAlloc"); error != cudaSuccess) return result(error);
  *memory = allocate_pinned(bytes);
  return result(*memory != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaMallocHost(void** memory, size_t bytes) { return cudaHostAlloc(memory, bytes, 0); }

cudaError_t cudaFreeHost(void* memory) {
  if (const cudaError_t error = finish_device(); error != cudaSuccess) return result(error);
  return result(deallocate_pinned(memory) ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned) {
  register_pinned(memory, bytes);
  return result(cudaSuccess);
}
cudaError_t cudaHostUnregister(void* memory) {
  return result(unregister_pinned(memory) ? cudaSuccess : cudaErrorHostMemoryNotRegistered);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory) {
  *attributes = {};
  const int device = device_of(memory);
  attributes->device = device < 0 ? current_device() : device;
  attributes->type = device >= 0         ? cudaMemoryTypeDevice
                     : is_pinned(memory) ? cudaMemoryTypeHost
                                         : cudaMemoryTypeUnregistered;
  attributes->devicePointer = device >= 0 || is_pinned(memory) ? const_cast<void*>(memory) : nullptr;
  attributes->hostPointer = device >= 0 ? nullptr : const_cast<void*>(memory);
  return result(cudaSuccess);
}

// A copy to pageable host memory is complete when the call returns.
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  const bool waits = device_of(target) < 0 && !is_pinned(target);
  if (waits && is_capturing(stream)) return result(finish(stream));
  const cudaError_t error = enqueue_copy(target, source, bytes, stream);
  return result(error == cudaSuccess && waits ? finish(stream) : error);
}

cudaError_t cudaMemcpyPeerAsync(void* target, int, const void* source, int, size_t bytes, cudaStream_t stream) {
  return result(enqueue_copy(target, source, bytes, stream));
}

cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind kind) {
  if (const cudaError_t error = forbid_in_capture("cudaMemcpy"); error != cudaSuccess) return result(error);
  const cudaError_t error = cudaMemcpyAsync(target, source, bytes, kind, nullptr);
  return result(error == cudaSuccess ? finish(nullptr) : error);
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  if (device_of(memory, bytes) < 0) return result(cudaErrorInvalidValue);
  return result(enqueue(stream, {"a memset", kAnyDevice, [=] { std::memset(memory, value, bytes); }}));
}

cudaError_t cudaMemset(void* memory, int value, size_t bytes) { return cudaMemsetAsync(memory, value, bytes, nullptr); }

}  // extern "C"
