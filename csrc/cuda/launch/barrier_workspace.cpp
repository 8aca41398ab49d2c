#include "barrier_workspace.h"

#include <map>
#include <memory>
#include <mutex>
#include <tuple>

namespace bnk::cuda {
namespace {

constexpr int64_t kWorkspaceBytes = int64_t{kBarrierWords} * kBarrierWordBytes;
constexpr int64_t kWorkspacesAtOnce = (int64_t{1} << 20) / kWorkspaceBytes;  // one megabyte

// Launches with equal keys run one after the other.
struct Key {
  int device;
  unsigned long long stream;   // its ID: unlike a handle, it is not reused
  unsigned long long capture;  // capture ID; 0: none

  bool operator<(const Key& other) const {
    return std::tie(device, stream, capture) < std::tie(other.device, other.stream, other.capture);
  }
};

// The mutex is never held across a CUDA call: the callback that returns a workspace runs on a driver thread.
class Workspaces {
 public:
  // Returns null if the key has no workspace.
  void* find(const Key& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = used_.find(key);
    return found == used_.end() ? nullptr : found->second;
  }

  // Returns the key's workspace, assigning it a free one if it has none. Returns null if none is free.
  void* take(const Key& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto found = used_.find(key); found != used_.end()) return found->second;
    std::vector<void*>& free = free_[key.device];
    if (free.empty()) return nullptr;
    void* workspace = free.back();
    free.pop_back();
    used_[key] = workspace;
    return workspace;
  }

  void give_back(const Key& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = used_.find(key);
    free_[key.device].push_back(found->second);
    used_.erase(found);
  }

  void add(int device, void* memory, int64_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (int64_t i = count; i-- > 0;) free_[device].push_back(static_cast<char*>(memory) + i * kWorkspaceBytes);
    allocated_[device].emplace_back(memory, count);
  }

  std::vector<std::pair<void*, int64_t>> allocated(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return allocated_[device];
  }

 private:
  std::mutex mutex_;
  std::map<Key, void*> used_;
  std::map<int, std::vector<void*>> free_;  // by device
  std::map<int, std::vector<std::pair<void*, int64_t>>> allocated_;
};

// Never destroyed: the driver may call back during static destruction.
Workspaces& workspaces() {
  static Workspaces& all = *new Workspaces;
  return all;
}

void on_graph_destroyed(void* argument) {
  const std::unique_ptr<Key> key(static_cast<Key*>(argument));
  workspaces().give_back(*key);
}

// Returns the key's workspace to the free list when the graph being captured is destroyed.
cudaError_t tie_to_graph(const Key& key, cudaGraph_t graph) {
  auto argument = std::make_unique<Key>(key);
  cudaUserObject_t object = nullptr;
  cudaError_t error =
      cudaUserObjectCreate(&object, argument.get(), on_graph_destroyed, 1, cudaUserObjectNoDestructorSync);
  if (error != cudaSuccess) {
    workspaces().give_back(key);
    return error;
  }
  (void)argument.release();  // now owned by the user object
  error = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
  if (error != cudaSuccess) (void)cudaUserObjectRelease(object, 1);
  return error;
}

}  // namespace

cudaError_t barrier_workspace_for(cudaStream_t stream, Host& host, void** workspace) {
  Key key{};
  cudaError_t error = cudaGetDevice(&key.device);
  if (error != cudaSuccess) return error;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
  error = cudaStreamGetCaptureInfo(stream, &status, &key.capture, &graph);
#else
  error = cudaStreamGetCaptureInfo_v2(stream, &status, &key.capture, &graph);
#endif
  if (error != cudaSuccess) return error;
  const bool is_captured = status == cudaStreamCaptureStatusActive;
  if (!is_captured) key.capture = 0;
  if ((error = cudaStreamGetId(stream, &key.stream)) != cudaSuccess) return error;

  if ((*workspace = workspaces().find(key)) != nullptr) return cudaSuccess;
  while ((*workspace = workspaces().take(key)) == nullptr) {
    workspaces().add(key.device, host.zeros(kWorkspacesAtOnce * kWorkspaceBytes), kWorkspacesAtOnce);
  }
  return is_captured ? tie_to_graph(key, graph) : cudaSuccess;
}

std::vector<std::pair<void*, int64_t>> barrier_workspaces(int device) { return workspaces().allocated(device); }

}  // namespace bnk::cuda
