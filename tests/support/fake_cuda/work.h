// Work: what was put on streams, and what of it must happen before what.
//
// Nothing runs when it is put on a stream: it runs when somebody waits for it, and only what must come before it does so
// too. That is the latest that a GPU could do it, so whoever does not wait for what he needs finds it not done; and work
// of two streams that no event orders is seen in an order that is not the program's.
//
// A stream that is captured into a graph adds nodes to the graph instead, and each launch of the graph runs its nodes in
// another order of those that their dependencies allow.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace fake_cuda {

inline constexpr int kAnyDevice = -1;

// A piece of work, on a stream or as a node of a graph; run holds copies of all that it needs.
struct Task {
  std::string what;
  int device;                 // whose stream it must be put on; kAnyDevice
  std::function<void()> run;  // empty: a point to wait for
};

// Puts it on a stream, or into the graph that the stream is captured into. The error of a stream that takes no more.
cudaError_t enqueue(cudaStream_t stream, Task task);

// What was put on streams since recording began, a line each; ends it. Within a capture: what was captured.
void begin_record();
void note(const std::string& what);  // a line of it
std::string end_record();

// Runs all that was put on a stream, and what that waits for.
cudaError_t finish(cudaStream_t stream);
cudaError_t finish_device();

// What CUDA refuses while a stream is captured, to threads that have not said that they know what they do
// (cudaThreadExchangeStreamCaptureMode); it ends the capture, too. `what` is for the message.
cudaError_t forbid_in_capture(const char* what);
bool is_capturing(cudaStream_t stream);

}  // namespace fake_cuda
