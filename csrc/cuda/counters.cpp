#include "counters.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

namespace bnk::cuda {
namespace {

constexpr int64_t kArena = int64_t{1} << 18;  // counters allocated at a time: one megabyte

struct Lease {
  unsigned* counters = nullptr;
  int64_t count = 0;
};

struct Key {
  int device;
  unsigned long long stream;
  unsigned long long capture;  // 0: none

  bool operator<(const Key& other) const {
    return std::tie(device, stream, capture) < std::tie(other.device, other.stream, other.capture);
  }
};

// Zeroed memory, by a stream of its own that no capture knows of.
cudaError_t allocate_zeros(int64_t count, unsigned** counters) {
  // Allocation is allowed while another stream captures only to a thread that says so.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return error;
  cudaStream_t stream = nullptr;
  void* memory = nullptr;
  const size_t bytes = static_cast<size_t>(count) * sizeof(unsigned);
  if ((error = cudaMalloc(&memory, bytes)) == cudaSuccess &&
      (error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)) == cudaSuccess) {
    error = cudaMemsetAsync(memory, 0, bytes, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    (void)cudaStreamDestroy(stream);
  }
  *counters = static_cast<unsigned*>(memory);
  const cudaError_t restored = cudaThreadExchangeStreamCaptureMode(&mode);
  return error != cudaSuccess ? error : restored;
}

// Never freed, not even at exit, when the driver may be gone.
struct Counters {
  std::mutex mutex;
  std::map<Key, Lease> leases;
  std::map<int, Lease> free;  // by device: what is left of the last arena

  cudaError_t lease(const Key& key, int64_t count, unsigned** counters) {
    const std::lock_guard<std::mutex> lock(mutex);
    Lease& lease = leases[key];
    if (lease.count < count) {
      Lease& arena = free[key.device];
      if (arena.count < count) {
        Lease fresh{nullptr, std::max(kArena, count)};
        const cudaError_t error = allocate_zeros(fresh.count, &fresh.counters);
        if (error != cudaSuccess) return error;
        arena = fresh;
      }
      lease = {arena.counters, count};
      arena = {arena.counters + count, arena.count - count};
    }
    *counters = lease.counters;
    return cudaSuccess;
  }
};

}  // namespace

cudaError_t lease_counters(int64_t count, cudaStream_t stream, unsigned** counters) {
  static Counters& all = *new Counters;
  Key key{};
  cudaError_t error = cudaGetDevice(&key.device);
  if (error != cudaSuccess) return error;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if ((error = cudaStreamGetCaptureInfo(stream, &status, &key.capture)) != cudaSuccess) return error;
  if (status == cudaStreamCaptureStatusNone) key.capture = 0;
  // Unlike its handle, a stream's number is not used again after its end.
  if ((error = cudaStreamGetId(stream, &key.stream)) != cudaSuccess) return error;
  return all.lease(key, count, counters);
}

}  // namespace bnk::cuda
