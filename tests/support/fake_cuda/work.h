// Work: what is enqueued on streams, and the dependencies between it.
//
// Nothing runs when it is enqueued. It runs when a caller waits for it, after the work that it depends on and no other.
// This is the latest that a GPU could run it: code that omits a necessary wait finds the work not done, and work of two
// streams that no event orders runs in an order other than the program's.
//
// A stream that is being captured into a graph adds nodes to the graph instead. Each launch of the graph runs its nodes
// in a different order that satisfies their dependencies.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace fake_cuda {

inline constexpr int kAnyDevice = -1;

// An item of work on a stream, or a node of a graph. `run` holds copies of everything that it needs.
struct Task {
  std::string what;
  int device;                 // the device of the stream that it must be enqueued on, or kAnyDevice
  std::function<void()> run;  // empty: only a point to wait for
};

// Enqueues work on a stream, or adds it to the graph into which the stream is captured. Returns an error if the stream
// cannot accept it.
cudaError_t enqueue(cudaStream_t stream, Task task);

// Records what is enqueued on streams, one line per item, including work that is captured. end_record() stops and
// returns it.
void begin_record();
void note(const std::string& what);  // adds a line
std::string end_record();

// Runs all work on a stream, and the work that it depends on.
cudaError_t finish(cudaStream_t stream);
cudaError_t finish_device();

// Implements the calls that CUDA forbids while a stream is captured, unless the thread permits them
// (cudaThreadExchangeStreamCaptureMode). Such a call also invalidates the capture. `what` is for the message.
cudaError_t forbid_in_capture(const char* what);
bool is_capturing(cudaStream_t stream);

}  // namespace fake_cuda
