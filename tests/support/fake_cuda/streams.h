// Streams, events and captures. Internal to the runtime; the types are those that CUDA's opaque handles point to.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <set>
#include <thread>

#include "fake_cuda/work.h"

namespace fake_cuda {

// An item of work on a stream.
struct Work {
  Task task;
  std::vector<std::shared_ptr<Work>> after;
  std::atomic<bool> done{false};
  std::chrono::steady_clock::time_point when{};  // the time of completion
};

struct Capture;

}  // namespace fake_cuda

struct CUgraphNode_st {
  fake_cuda::Task task;
  std::vector<std::shared_ptr<CUgraphNode_st>> after;
};

namespace fake_cuda {
using Nodes = std::vector<std::shared_ptr<CUgraphNode_st>>;
}

struct CUstream_st {
  int device;
  bool blocking;  // synchronizes with the legacy stream, in both directions
  unsigned long long id;
  std::shared_ptr<fake_cuda::Work> last{};
  std::vector<std::shared_ptr<fake_cuda::Work>> waits_for{};  // dependencies of the next work, in addition to `last`
  fake_cuda::Capture* capture = nullptr;
  fake_cuda::Nodes ends{};  // while captured: dependencies of the next node
};

struct CUevent_st {
  int device;
  bool timing;
  std::shared_ptr<fake_cuda::Work> work{};  // of the last record; null: not recorded, or recorded in a capture
  fake_cuda::Capture* capture = nullptr;    // of the last record; accessed only by capture_of()
  unsigned long long capture_id = 0;
  fake_cuda::Nodes ends{};
};

// Calls `destroy` when the last reference is released: the caller's, those of graphs, and those of pending launches.
struct CUuserObject_st {
  void* argument;
  cudaHostFn_t destroy;

  CUuserObject_st(void* argument, cudaHostFn_t destroy) : argument(argument), destroy(destroy) {}
  CUuserObject_st(const CUuserObject_st&) = delete;
  CUuserObject_st& operator=(const CUuserObject_st&) = delete;
  ~CUuserObject_st() { destroy(argument); }
};

struct CUgraph_st {
  fake_cuda::Nodes nodes;  // in the order of capture
  std::vector<std::shared_ptr<CUuserObject_st>> objects{};
};

namespace fake_cuda {

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  CUstream_st* origin;
  std::thread::id thread;
  std::unique_ptr<CUgraph_st> graph = std::make_unique<CUgraph_st>();
  std::set<CUstream_st*> streams{};
  bool valid = true;
};

// The stream of a handle; 0 and cudaStreamLegacy are the current device's legacy stream. Null if there is no such
// stream.
CUstream_st* stream_of(cudaStream_t handle);
CUstream_st* make_stream(int device, bool blocking);
void destroy_stream(CUstream_st* stream);

// Like enqueue, for callers that hold the lock.
cudaError_t put(CUstream_st* stream, Task task);
// For callers that hold the lock: work that completes after all work on the stream.
std::shared_ptr<Work> tail(CUstream_st* stream);
// For callers that do not hold the lock.
cudaError_t finish_work(const std::shared_ptr<Work>& work);

// The active captures.
std::set<Capture*>& captures();
// The active capture in which the event was last recorded; null if there is none.
Capture* capture_of(const CUevent_st* event);
cudaError_t invalidate(Capture* capture, cudaError_t error, const char* why);
// The calling thread's mode, as set by cudaThreadExchangeStreamCaptureMode.
cudaStreamCaptureMode& thread_mode();

}  // namespace fake_cuda
