// Kernels with one fault each, in the package's namespace. compute-sanitizer must find them with the options of bench/gpu.sh;
// otherwise a clean run on the package proves nothing.
//
//   planted memcheck|racecheck|synccheck
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace bnk {

constexpr int kThreads = 64;

__global__ void reads_one_beyond_the_end(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }

__global__ void misses_a_barrier(const float* x, float* y) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];  // written by the other warp
}

__global__ void divides_at_a_barrier(const float* x, float* y) {
  __shared__ float tile[kThreads];
  if (threadIdx.x < kThreads / 2 + 7) {
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x / 2];
  }
}

}  // namespace bnk

int main(int argc, char** argv) {
  const char* tool = argc == 2 ? argv[1] : "";
  void (*kernel)(const float*, float*) = nullptr;
  if (std::strcmp(tool, "memcheck") == 0) kernel = bnk::reads_one_beyond_the_end;
  if (std::strcmp(tool, "racecheck") == 0) kernel = bnk::misses_a_barrier;
  if (std::strcmp(tool, "synccheck") == 0) kernel = bnk::divides_at_a_barrier;
  if (kernel == nullptr) {
    std::fprintf(stderr, "usage: planted memcheck|racecheck|synccheck\n");
    return 2;
  }
  float* x = nullptr;
  float* y = nullptr;
  if (cudaMalloc(&x, bnk::kThreads * sizeof(float)) != cudaSuccess) return 3;
  if (cudaMalloc(&y, bnk::kThreads * sizeof(float)) != cudaSuccess) return 3;
  if (cudaMemset(x, 0, bnk::kThreads * sizeof(float)) != cudaSuccess) return 3;
  kernel<<<1, bnk::kThreads>>>(x, y);
  // Without a tool the memory error is not detected: the allocator rounds sizes up.
  return cudaDeviceSynchronize() == cudaSuccess ? 0 : 3;
}
