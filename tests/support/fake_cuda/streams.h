// Streams, events and captures. Internal to the runtime; the types are those that CUDA's handles point to.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <set>
#include <thread>

#include "fake_cuda/work.h"

namespace fake_cuda {

// What was put on a stream.
struct Work {
  Task task;
  std::vector<std::shared_ptr<Work>> after;
  std::atomic<bool> done{false};
  std::chrono::steady_clock::time_point when{};  // it was done
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
  bool blocking;  // waits for the legacy stream, and that for it
  unsigned long long id;
  std::shared_ptr<fake_cuda::Work> last{};
  std::vector<std::shared_ptr<fake_cuda::Work>> waits_for{};  // what comes next, beside `last`
  fake_cuda::Capture* capture = nullptr;
  fake_cuda::Nodes ends{};  // captured: what the next node comes after
};

struct CUevent_st {
  int device;
  bool timing;
  std::shared_ptr<fake_cuda::Work> work{};  // of the last record; null: none, or one that was captured
  fake_cuda::Capture* capture = nullptr;    // of the last record; looked at by capture_of() alone
  unsigned long long capture_id = 0;
  fake_cuda::Nodes ends{};
};

// Calls back when the last reference is gone: the caller's, those of graphs, and those of launches that are not over.
struct CUuserObject_st {
  void* argument;
  cudaHostFn_t destroy;

  CUuserObject_st(void* argument, cudaHostFn_t destroy) : argument(argument), destroy(destroy) {}
  CUuserObject_st(const CUuserObject_st&) = delete;
  CUuserObject_st& operator=(const CUuserObject_st&) = delete;
  ~CUuserObject_st() { destroy(argument); }
};

struct CUgraph_st {
  fake_cuda::Nodes nodes;  // in the order of their capture
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

// A handle's stream: 0 and cudaStreamLegacy are the current device's. Null where there is no such stream.
CUstream_st* stream_of(cudaStream_t handle);
CUstream_st* make_stream(int device, bool blocking);
void destroy_stream(CUstream_st* stream);

// With the lock held: the same as enqueue, forbid_in_capture.
cudaError_t put(CUstream_st* stream, Task task);
// With the lock held: what a waiter for all that is on the stream waits for.
std::shared_ptr<Work> tail(CUstream_st* stream);
// Without the lock.
cudaError_t finish_work(const std::shared_ptr<Work>& work);

// The captures that go on.
std::set<Capture*>& captures();
// That which the event was last recorded in, if it goes on; else null.
Capture* capture_of(const CUevent_st* event);
cudaError_t invalidate(Capture* capture, cudaError_t error, const char* why);
// The calling thread's word to cudaThreadExchangeStreamCaptureMode.
cudaStreamCaptureMode& thread_mode();

}  // namespace fake_cuda
