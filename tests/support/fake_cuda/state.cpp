#include "fake_cuda/state.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace fake_cuda {
namespace {

int number(const char* variable, int otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr ? otherwise : std::atoi(text);
}

thread_local int device = 0;
thread_local cudaError_t last_error = cudaSuccess;
std::atomic<bool> faulted{false};

}  // namespace

const bnk::DeviceLimits& limits() {
  static const bnk::DeviceLimits all{.multiprocessors = number("FAKE_CUDA_MULTIPROCESSORS", 8),
                                     .max_threads_per_multiprocessor = 2048,
                                     .max_blocks_per_multiprocessor = 32,
                                     .shared_per_multiprocessor = 228 << 10,
                                     .shared_per_block = 227 << 10,
                                     .shared_reserved = 1 << 10,
                                     .cooperative_launch = true,
                                     .max_cluster = number("FAKE_CUDA_MAX_CLUSTER", 8)};
  return all;
}

int max_blocks_per_multiprocessor_limit() {
  static const int most = number("FAKE_CUDA_BLOCKS_PER_MULTIPROCESSOR", limits().max_blocks_per_multiprocessor);
  return most;
}

size_t global_memory() {
  static const size_t megabytes = static_cast<size_t>(number("FAKE_CUDA_MEMORY_MB", 4096));
  return megabytes << 20;
}

bool refuses(const char* what) {
  const char* all = std::getenv("FAKE_CUDA_REFUSES");
  return all != nullptr && std::string(all).find(what) != std::string::npos;
}

int ptx_version() {
  static const int version = number("FAKE_CUDA_PTX", 90);
  return version;
}

int current_device() { return device; }
void set_current_device(int next) { device = next; }

cudaError_t result(cudaError_t error) {
  if (faulted) error = cudaErrorLaunchFailure;
  // cudaErrorNotReady is a status, not an error.
  if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
  return error;
}

cudaError_t take_error() {
  const cudaError_t error = peek_error();
  last_error = cudaSuccess;
  return error;
}

cudaError_t peek_error() { return faulted ? cudaErrorLaunchFailure : last_error; }

void fault(const std::string& text) {
  std::fprintf(stderr, "fake CUDA device: %s\n", text.c_str());
  faulted = true;
}

bool has_faulted() { return faulted; }

cudaError_t unsupported(const std::string& what) {
  std::fprintf(stderr, "fake CUDA device: %s\n", what.c_str());
  return result(cudaErrorNotSupported);
}

std::unique_lock<std::mutex> lock() {
  static std::mutex& mutex = *new std::mutex;
  return std::unique_lock<std::mutex>(mutex);
}

}  // namespace fake_cuda
