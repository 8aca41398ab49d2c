// Barrier workspace: the zero-initialized words of grid-level barriers (BarrierWord, in device/persistent.cuh).
//
// Every launch leaves its words in the state that the next one needs, so no call spends a launch on clearing them. Two
// launches that can run concurrently must not share words:
//
//   a stream    keeps one workspace until the process ends, since its launches run one after the other (torch's pool
//               has few streams; every additional stream takes 16 KiB more)
//   a capture   takes one for each stream that it captures, since replays run on any stream. A CUDA user object returns
//               it when the graph and all its executable graphs are destroyed and their replays have finished.
//
// CUDA runs the replays of one executable graph one after the other. Concurrent replays of two executable graphs of one
// capture are not supported: they share words.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "../backend.h"

namespace bnk::cuda {

// The workspace, of kBarrierWords words, for launches on `stream` on the current device. Allocates memory from the host
// when every workspace of the device is in use, during a capture too.
cudaError_t barrier_workspace_for(cudaStream_t stream, Host& host, void** workspace);

// All memory allocated for workspaces of a device, as (address, number of workspaces).
std::vector<std::pair<void*, int64_t>> barrier_workspaces(int device);

}  // namespace bnk::cuda
