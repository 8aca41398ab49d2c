// Runtime API: streams and events.
#include "fake_cuda/state.h"
#include "fake_cuda/streams.h"

using namespace fake_cuda;  // NOLINT: this file is a part of fake_cuda

extern "C" {

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  const auto guard = lock();
  *stream = make_stream(current_device(), (flags & cudaStreamNonBlocking) == 0);
  return result(cudaSuccess);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

// Runs the pending work of the stream first, since other streams may wait for it.
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  if (const cudaError_t error = finish(handle); error != cudaSuccess) return result(error);
  const auto guard = lock();
  destroy_stream(stream_of(handle));
  return result(cudaSuccess);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return result(finish(stream)); }
cudaError_t cudaDeviceSynchronize() { return result(finish_device()); }

// Runs the pending work, so that a caller that polls eventually gets cudaSuccess.
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  bool done = false;
  {
    const auto guard = lock();
    CUstream_st* stream = stream_of(handle);
    if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
    if (stream->capture != nullptr) {
      return result(invalidate(stream->capture, cudaErrorStreamCaptureUnsupported, "a question to the stream"));
    }
    done = (!stream->last || stream->last->done) && stream->waits_for.empty();
  }
  const cudaError_t error = finish(handle);
  return result(error != cudaSuccess || done ? error : cudaErrorNotReady);
}

cudaError_t cudaStreamGetId(cudaStream_t handle, unsigned long long* id) {
  const auto guard = lock();
  CUstream_st* stream = stream_of(handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  *id = stream->id;
  return result(cudaSuccess);
}

cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return result(cudaSuccess);
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return result(cudaSuccess);
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return result(enqueue(stream, {"a host function", current_device(), [=] { function(data); }}));
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = new CUevent_st{current_device(), (flags & cudaEventDisableTiming) == 0};
  return result(cudaSuccess);
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const auto guard = lock();
  delete event;
  return result(cudaSuccess);
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned) {
  const auto guard = lock();
  CUstream_st* stream = stream_of(handle);
  if (stream == nullptr || stream->device != event->device) return result(cudaErrorInvalidResourceHandle);
  event->capture = stream->capture;
  event->capture_id = stream->capture == nullptr ? 0 : stream->capture->id;
  event->ends = stream->ends;
  event->work = nullptr;
  if (stream->capture != nullptr) return result(cudaSuccess);
  const cudaError_t error = put(stream, {"an event", stream->device, {}});
  event->work = stream->last;
  return result(error);
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  const auto guard = lock();
  CUstream_st* stream = stream_of(handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (Capture* capture = capture_of(event)) {
    if (stream->capture == nullptr) {
      stream->capture = capture;
      capture->streams.insert(stream);
    } else if (stream->capture != capture) {
      return result(invalidate(stream->capture, cudaErrorStreamCaptureMerge, "a wait for another capture's event"));
    }
    stream->ends.insert(stream->ends.end(), event->ends.begin(), event->ends.end());
    return result(cudaSuccess);
  }
  if (!event->work) return result(cudaSuccess);  // never recorded
  if (stream->capture != nullptr) {
    return result(invalidate(stream->capture, cudaErrorStreamCaptureIsolation, "a wait for an event of before"));
  }
  stream->waits_for.push_back(event->work);
  return result(cudaSuccess);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (const cudaError_t error = forbid_in_capture("a question to an event"); error != cudaSuccess) {
    return result(error);
  }
  std::shared_ptr<Work> work;
  {
    const auto guard = lock();
    work = event->work;
  }
  if (!work || work->done) return result(cudaSuccess);
  const cudaError_t error = finish_work(work);
  return result(error != cudaSuccess ? error : cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  std::shared_ptr<Work> work;
  {
    const auto guard = lock();
    if (Capture* capture = capture_of(event)) {
      return result(invalidate(capture, cudaErrorStreamCaptureUnsupported, "a wait for an event"));
    }
    work = event->work;
  }
  return result(work ? finish_work(work) : cudaSuccess);
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  if (!start->timing || !end->timing || !start->work || !end->work) return result(cudaErrorInvalidResourceHandle);
  if (!start->work->done || !end->work->done) return result(cudaErrorNotReady);
  *milliseconds = std::chrono::duration<float, std::milli>(end->work->when - start->work->when).count();
  return result(cudaSuccess);
}

}  // extern "C"
