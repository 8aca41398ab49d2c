// Runtime API: captures and graphs.
#include <algorithm>
#include <map>
#include <random>

#include "fake_cuda/state.h"
#include "fake_cuda/streams.h"

using namespace fake_cuda;  // NOLINT: this file is a part of fake_cuda

struct CUgraphExec_st {
  Nodes nodes;
  std::vector<std::shared_ptr<CUuserObject_st>> objects;
  unsigned launches = 0;
};

namespace {

// Runs every node once, after its dependencies. The seed selects one of the possible orders.
void run_all(const Nodes& nodes, unsigned seed) {
  std::mt19937 random(seed);
  Nodes left = nodes;
  std::shuffle(left.begin(), left.end(), random);
  std::set<const CUgraphNode_st*> done;
  while (!left.empty()) {
    const auto next = std::find_if(left.begin(), left.end(), [&](const auto& node) {
      return std::all_of(node->after.begin(), node->after.end(),
                         [&](const auto& other) { return done.count(other.get()) != 0; });
    });
    const std::shared_ptr<CUgraphNode_st> node = *next;
    left.erase(next);
    if (node->task.run && !has_faulted()) node->task.run();
    done.insert(node.get());
  }
}

// Whether the origin's last node depends, directly or indirectly, on the last node of each stream of the capture.
bool is_joined(const Capture& capture) {
  std::set<const CUgraphNode_st*> before;
  Nodes path = capture.origin->ends;
  while (!path.empty()) {
    const std::shared_ptr<CUgraphNode_st> node = path.back();
    path.pop_back();
    if (!before.insert(node.get()).second) continue;
    path.insert(path.end(), node->after.begin(), node->after.end());
  }
  return std::all_of(capture.streams.begin(), capture.streams.end(), [&](const CUstream_st* stream) {
    return std::all_of(stream->ends.begin(), stream->ends.end(),
                       [&](const auto& node) { return before.count(node.get()) != 0; });
  });
}

}  // namespace

extern "C" {

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode());
  return result(cudaSuccess);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  static unsigned long long last_id = 0;
  const auto guard = lock();
  CUstream_st* stream = stream_of(handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (handle == nullptr || handle == cudaStreamLegacy) return result(cudaErrorStreamCaptureUnsupported);
  if (stream->capture != nullptr) return result(cudaErrorIllegalState);
  auto* capture = new Capture{++last_id, mode, stream, std::this_thread::get_id()};
  capture->streams.insert(stream);
  captures().insert(capture);
  stream->capture = capture;
  stream->ends.clear();
  return result(cudaSuccess);
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  *graph = nullptr;
  const auto guard = lock();
  CUstream_st* stream = stream_of(handle);
  if (stream == nullptr || stream->capture == nullptr) return result(cudaErrorIllegalState);
  if (stream->capture->origin != stream) return result(cudaErrorStreamCaptureUnmatched);
  const std::unique_ptr<Capture> capture(stream->capture);
  const bool combined = is_joined(*capture);
  for (CUstream_st* captured : capture->streams) {
    captured->capture = nullptr;
    captured->ends.clear();
  }
  captures().erase(capture.get());
  if (!capture->valid) return result(cudaErrorStreamCaptureInvalidated);
  if (!combined) return result(cudaErrorStreamCaptureUnjoined);
  *graph = capture->graph.release();
  return result(cudaSuccess);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const auto guard = lock();
  const CUstream_st* stream = stream_of(handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  *status = stream->capture == nullptr ? cudaStreamCaptureStatusNone
            : stream->capture->valid   ? cudaStreamCaptureStatusActive
                                       : cudaStreamCaptureStatusInvalidated;
  return result(cudaSuccess);
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  if (const cudaError_t error = cudaStreamIsCapturing(handle, status); error != cudaSuccess) return error;
  const auto guard = lock();
  const CUstream_st* stream = stream_of(handle);
  if (stream->capture == nullptr) return result(cudaSuccess);
  if (id != nullptr) *id = stream->capture->id;
  if (graph != nullptr) *graph = stream->capture->graph.get();
  if (edges != nullptr) *edges = nullptr;
  // An array of handles, valid until this thread's next call.
  thread_local std::vector<cudaGraphNode_t> ends;
  ends.clear();
  for (const auto& node : stream->ends) ends.push_back(node.get());
  if (dependencies != nullptr) *dependencies = ends.data();
  if (count != nullptr) *count = ends.size();
  return result(cudaSuccess);
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (nodes == nullptr) {
    *count = graph->nodes.size();
    return result(cudaSuccess);
  }
  *count = std::min(*count, graph->nodes.size());
  for (size_t i = 0; i < *count; ++i) nodes[i] = graph->nodes[i].get();
  return result(cudaSuccess);
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new CUgraphExec_st{graph->nodes, graph->objects};
  return result(cudaSuccess);
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiate(exec, graph, flags);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  const unsigned seed = exec->launches++;
  return result(enqueue(stream, {"a graph", current_device(),
                                 [nodes = exec->nodes, objects = exec->objects, seed] { run_all(nodes, seed); }}));
}

// The references that the caller owns until they are moved to a graph or released.
std::map<cudaUserObject_t, std::shared_ptr<CUuserObject_st>>& owned_objects() {
  static auto& all = *new std::map<cudaUserObject_t, std::shared_ptr<CUuserObject_st>>;
  return all;
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* argument, cudaHostFn_t destroy, unsigned references,
                                 unsigned flags) {
  if (references != 1 || flags != cudaUserObjectNoDestructorSync) return result(cudaErrorInvalidValue);
  const auto made = std::make_shared<CUuserObject_st>(argument, destroy);
  const auto guard = lock();
  owned_objects()[made.get()] = made;
  *object = made.get();
  return result(cudaSuccess);
}

cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned references, unsigned flags) {
  if (references != 1) return result(cudaErrorInvalidValue);
  const auto guard = lock();
  const auto found = owned_objects().find(object);
  if (found == owned_objects().end()) return result(cudaErrorInvalidValue);
  graph->objects.push_back(found->second);
  if (flags == cudaGraphUserObjectMove) owned_objects().erase(found);
  return result(cudaSuccess);
}

cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned references) {
  if (references != 1) return result(cudaErrorInvalidValue);
  std::shared_ptr<CUuserObject_st> last;  // destroyed last, so that it calls back without the lock
  const auto guard = lock();
  const auto found = owned_objects().find(object);
  if (found == owned_objects().end()) return result(cudaErrorInvalidValue);
  last = found->second;
  owned_objects().erase(found);
  return result(cudaSuccess);
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return result(cudaSuccess);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return result(cudaSuccess);
}

}  // extern "C"
