#include "fake_cuda/streams.h"

#include <algorithm>
#include <cstdio>

#include "fake_cuda/state.h"

namespace fake_cuda {
namespace {

// More than a GPU's queues hold: such old work would have started already.
constexpr int kPending = 1024;

struct Streams {
  std::set<CUstream_st*> all;
  CUstream_st* legacy[kDevices];
  unsigned long long last_id = 0;
};

CUstream_st* add(Streams& streams, int device, bool blocking) {
  return *streams.all.insert(new CUstream_st{device, blocking, ++streams.last_id}).first;
}

Streams& streams() {
  static Streams& all = *[] {
    auto* made = new Streams;
    for (int device = 0; device < kDevices; ++device) made->legacy[device] = add(*made, device, true);
    return made;
  }();
  return all;
}

bool recording = false;
std::string record;

bool is_legacy(const CUstream_st* stream) { return streams().legacy[stream->device] == stream; }

// Runs one item of work whose dependencies are done.
void run(Work& work) {
  if (work.task.run && !has_faulted()) work.task.run();
  work.when = std::chrono::steady_clock::now();
  work.task.run = {};  // releases what it holds: memory, a graph's user objects
  const auto guard = lock();
  work.after.clear();
  work.done = true;
}

}  // namespace

CUstream_st* stream_of(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy) return streams().legacy[current_device()];
  return streams().all.count(handle) != 0 ? handle : nullptr;
}

CUstream_st* make_stream(int device, bool blocking) { return add(streams(), device, blocking); }

void destroy_stream(CUstream_st* stream) {
  streams().all.erase(stream);
  delete stream;
}

std::shared_ptr<Work> tail(CUstream_st* stream) {
  auto combined = std::make_shared<Work>();
  combined->task = {"a wait", stream->device, {}};
  if (stream->last) combined->after.push_back(stream->last);
  combined->after.insert(combined->after.end(), stream->waits_for.begin(), stream->waits_for.end());
  for (CUstream_st* other : streams().all) {
    const bool ordered = other->device == stream->device && other->blocking && stream->blocking && other->last &&
                         is_legacy(other) != is_legacy(stream);
    if (ordered) combined->after.push_back(other->last);
  }
  return combined;
}

cudaError_t put(CUstream_st* stream, Task task) {
  if (recording && task.run) record += task.what + '\n';
  if (stream->capture != nullptr) {
    if (!stream->capture->valid) return cudaErrorStreamCaptureInvalidated;
    auto node = std::make_shared<CUgraphNode_st>(CUgraphNode_st{std::move(task), std::move(stream->ends)});
    stream->ends = {node};
    stream->capture->graph->nodes.push_back(std::move(node));
    return cudaSuccess;
  }
  if (is_legacy(stream)) {
    for (Capture* capture : captures()) {
      // The work would wait for the captured streams, which do not run.
      if (capture->origin->device == stream->device && capture->origin->blocking) {
        return invalidate(capture, cudaErrorStreamCaptureImplicit, task.what.c_str());
      }
    }
  }
  const std::shared_ptr<Work> work = tail(stream);
  work->task = std::move(task);
  stream->last = work;
  stream->waits_for.clear();
  return cudaSuccess;
}

void begin_record() {
  const auto guard = lock();
  recording = true;
  record.clear();
}

void note(const std::string& what) {
  const auto guard = lock();
  if (recording) record += what + '\n';
}

std::string end_record() {
  const auto guard = lock();
  recording = false;
  return record;
}

cudaError_t finish_work(const std::shared_ptr<Work>& work) {
  static std::recursive_mutex& running = *new std::recursive_mutex;
  const std::lock_guard<std::recursive_mutex> one_at_a_time(running);
  std::vector<std::shared_ptr<Work>> path{work};
  while (!path.empty()) {
    const std::shared_ptr<Work> top = path.back();
    std::shared_ptr<Work> before;  // a dependency that is not done
    if (!top->done) {
      const auto guard = lock();
      const auto found =
          std::find_if(top->after.begin(), top->after.end(), [](const auto& work) { return !work->done; });
      if (found != top->after.end()) before = *found;
    }
    if (before) {
      path.push_back(before);
    } else {
      if (!top->done) run(*top);
      path.pop_back();
    }
  }
  return has_faulted() ? cudaErrorLaunchFailure : cudaSuccess;
}

cudaError_t enqueue(cudaStream_t handle, Task task) {
  std::shared_ptr<Work> begun;
  {
    const auto guard = lock();
    CUstream_st* stream = stream_of(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (task.device != kAnyDevice && task.device != stream->device) return cudaErrorInvalidResourceHandle;
    const cudaError_t error = put(stream, std::move(task));
    if (error != cudaSuccess || stream->capture != nullptr) return error;
    // Work that was enqueued on the stream kPending items ago must be done.
    begun = stream->last;
    for (int i = 0; i < kPending && begun; ++i) begun = begun->after.empty() ? nullptr : begun->after.front();
  }
  return begun ? finish_work(begun) : cudaSuccess;
}

cudaError_t finish(cudaStream_t handle) {
  std::shared_ptr<Work> work;
  {
    const auto guard = lock();
    CUstream_st* stream = stream_of(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (stream->capture != nullptr) {
      return invalidate(stream->capture, cudaErrorStreamCaptureUnsupported, "a wait for the stream");
    }
    work = tail(stream);
  }
  return finish_work(work);
}

cudaError_t finish_device() {
  std::vector<std::shared_ptr<Work>> all;
  {
    const auto guard = lock();
    for (CUstream_st* stream : streams().all) {
      if (stream->device != current_device()) continue;
      if (stream->capture != nullptr) {
        return invalidate(stream->capture, cudaErrorStreamCaptureUnsupported, "a wait for the device");
      }
      all.push_back(tail(stream));
    }
  }
  cudaError_t error = cudaSuccess;
  for (const auto& work : all) error = finish_work(work);
  return error;
}

// ---- captures -------------------------------------------------------------------------------------------------------

std::set<Capture*>& captures() {
  static std::set<Capture*>& all = *new std::set<Capture*>;
  return all;
}

Capture* capture_of(const CUevent_st* event) {
  const bool goes_on = captures().count(event->capture) != 0 && event->capture->id == event->capture_id;
  return goes_on ? event->capture : nullptr;
}

cudaStreamCaptureMode& thread_mode() {
  thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  return mode;
}

cudaError_t invalidate(Capture* capture, cudaError_t error, const char* why) {
  std::fprintf(stderr, "fake CUDA device: %s: not while a stream is captured\n", why);
  capture->valid = false;
  return error;
}

cudaError_t forbid_in_capture(const char* what) {
  if (thread_mode() == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  const auto guard = lock();
  for (Capture* capture : captures()) {
    const bool own = capture->thread == std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed;
    const bool other = capture->mode == cudaStreamCaptureModeGlobal && thread_mode() == cudaStreamCaptureModeGlobal;
    if (own || other) return invalidate(capture, cudaErrorStreamCaptureUnsupported, what);
  }
  return cudaSuccess;
}

bool is_capturing(cudaStream_t handle) {
  const auto guard = lock();
  CUstream_st* stream = stream_of(handle);
  return stream != nullptr && stream->capture != nullptr;
}

}  // namespace fake_cuda
