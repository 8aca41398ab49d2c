// Barrier workspace: the zero-initialized words of grid-level barriers (BarrierWord, in kernels/resident.cuh).
//
// Every launch leaves its words in the state in which the next one needs them, so no call spends a launch on clearing
// them. Two launches that can run concurrently must not share words:
//
//   a stream    keeps one workspace until the process ends, since its launches run one after the other (the streams of
//               torch's pool are few; each other stream that is made takes 16 KiB more)
//   a capture   takes one for each stream that it captures, since replays run on any stream. A CUDA user object returns
//               it when the graph and all its executable graphs are destroyed and their replays are over.
//
// CUDA runs the replays of one executable graph one after the other. Two executable graphs of one capture that run
// concurrently are not supported: they share words.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "../backend.h"

namespace bnk::cuda {

// The workspace of launches on `stream`, of kBarrierWords words, on the current device. Takes memory from the host when
// every workspace of the device is in use, during a capture as well.
cudaError_t barrier_workspace_for(cudaStream_t stream, Host& host, void** workspace);

// All memory that was allocated for workspaces of a device, as (address, number of workspaces).
std::vector<std::pair<void*, int64_t>> barrier_workspaces(int device);

}  // namespace bnk::cuda
