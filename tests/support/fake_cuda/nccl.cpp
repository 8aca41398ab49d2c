// The part of NCCL that torch uses for a process group: collectives as work on streams, through memory that the
// processes share.
//
// As with NCCL, a collective starts when its stream reaches it and ends when it has started on every rank; it is
// asynchronous to the call. The types, constants and function names are those of nccl.h.
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "fake_cuda/state.h"
#include "fake_cuda/work.h"

using namespace fake_cuda;  // NOLINT: this file is a part of fake_cuda

namespace {

enum Result { kSuccess = 0, kSystemError = 2, kInvalidArgument = 4, kInvalidUsage = 5 };
struct UniqueId {
  char name[128];  // of the shared memory
};

constexpr int kRanks = 8;
constexpr size_t kSlot = size_t{1} << 20;  // bytes of one rank per exchange
constexpr std::chrono::seconds kPatience{60};

// In shared memory, initially zero.
struct Shared {
  std::atomic<int> arrived;
  std::atomic<int> round;
  char slots[kRanks][kSlot];
};

size_t size_of(int type) {
  constexpr size_t kSizes[] = {1, 1, 4, 4, 8,
                               8, 2, 4, 8, 2};  // int8 uint8 int32 uint32 int64 uint64 half float double bfloat16
  return type >= 0 && type < 10 ? kSizes[type] : 0;
}
constexpr int kInt64 = 4, kFloat = 7, kDouble = 8, kSum = 0;

template <typename T>
void add(char* target, const char* more, size_t bytes) {
  for (size_t at = 0; at < bytes; at += sizeof(T)) {
    T a, b;
    std::memcpy(&a, target + at, sizeof(T));
    std::memcpy(&b, more + at, sizeof(T));
    a += b;
    std::memcpy(target + at, &a, sizeof(T));
  }
}

}  // namespace

struct ncclComm {
  int ranks, rank, device;
  Shared* shared;

  // Every rank arrives before any rank leaves.
  bool meet() const {
    const int round = shared->round;
    if (++shared->arrived == ranks) {
      shared->arrived = 0;
      ++shared->round;
      return true;
    }
    const auto end = std::chrono::steady_clock::now() + kPatience;
    while (shared->round == round) {
      if (std::chrono::steady_clock::now() > end) {
        fault("a collective that not every rank came to");
        return false;
      }
      sched_yield();
    }
    return true;
  }

  // Exchanges `bytes` bytes of every rank in pieces: calls take(rank, offset, data, bytes) for each.
  template <typename Take>
  void exchange(const char* own, size_t bytes, const Take& take) const {
    for (size_t offset = 0; offset < bytes; offset += kSlot) {
      const size_t piece = std::min(kSlot, bytes - offset);
      std::memcpy(shared->slots[rank], own + offset, piece);
      if (!meet()) return;
      for (int other = 0; other < ranks; ++other) take(other, offset, shared->slots[other], piece);
      if (!meet()) return;
    }
  }
};

namespace {

int put(cudaStream_t stream, const char* what, const ncclComm* comm, std::function<void()> run) {
  return enqueue(stream, {what, comm->device, std::move(run)}) == cudaSuccess ? kSuccess : kInvalidUsage;
}

}  // namespace

extern "C" {

int ncclGetUniqueId(UniqueId* id) {
  static std::atomic<int> count{0};
  *id = {};
  std::snprintf(id->name, sizeof id->name, "/bnkernels-%d-%d", getpid(), ++count);
  const int file = shm_open(id->name, O_CREAT | O_EXCL | O_RDWR, 0600);
  const bool sized = file >= 0 && ftruncate(file, sizeof(Shared)) == 0;
  if (file >= 0) close(file);
  return sized ? kSuccess : kSystemError;
}

int ncclCommInitRankConfig(ncclComm** comm, int ranks, UniqueId id, int rank, void*) {
  if (ranks > kRanks) return kInvalidArgument;
  const int file = shm_open(id.name, O_RDWR, 0600);
  if (file < 0) return kSystemError;
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) return kSystemError;
  *comm = new ncclComm{ranks, rank, current_device(), static_cast<Shared*>(memory)};
  const bool met = (*comm)->meet();  // after this, the name is no longer needed
  if (rank == 0) shm_unlink(id.name);
  return met ? kSuccess : kSystemError;
}
int ncclCommInitRank(ncclComm** comm, int ranks, UniqueId id, int rank) {
  return ncclCommInitRankConfig(comm, ranks, id, rank, nullptr);
}

int ncclCommGetAsyncError(ncclComm*, int* error) {
  *error = kSuccess;
  return kSuccess;
}
int ncclCommCount(const ncclComm* comm, int* count) {
  *count = comm->ranks;
  return kSuccess;
}
int ncclCommUserRank(const ncclComm* comm, int* rank) {
  *rank = comm->rank;
  return kSuccess;
}
int ncclCommFinalize(ncclComm*) { return kSuccess; }
int ncclCommDestroy(ncclComm* comm) {
  munmap(comm->shared, sizeof(Shared));
  delete comm;
  return kSuccess;
}
int ncclCommAbort(ncclComm* comm) { return ncclCommDestroy(comm); }

// Registration is a no-op.
int ncclCommRegister(ncclComm*, void*, size_t, void** handle) {
  *handle = nullptr;
  return kSuccess;
}
int ncclCommDeregister(ncclComm*, void*) { return kSuccess; }

int ncclGroupStart() { return kSuccess; }
int ncclGroupEnd() { return kSuccess; }

int ncclAllGather(const void* send, void* receive, size_t count, int type, ncclComm* comm, cudaStream_t stream) {
  const size_t bytes = count * size_of(type);
  if (size_of(type) == 0) return kInvalidArgument;
  return put(stream, "ncclAllGather", comm, [=] {
    comm->exchange(static_cast<const char*>(send), bytes, [&](int rank, size_t offset, const char* data, size_t piece) {
      std::memcpy(static_cast<char*>(receive) + static_cast<size_t>(rank) * bytes + offset, data, piece);
    });
  });
}

int ncclAllReduce(const void* send, void* receive, size_t count, int type, int operation, ncclComm* comm,
                  cudaStream_t stream) {
  const auto sum = type == kFloat    ? add<float>
                   : type == kDouble ? add<double>
                   : type == kInt64  ? add<int64_t>
                                     : nullptr;
  if (sum == nullptr || operation != kSum) return kInvalidArgument;
  return put(stream, "ncclAllReduce", comm, [=] {
    comm->exchange(static_cast<const char*>(send), count * size_of(type),
                   [&](int rank, size_t offset, const char* data, size_t piece) {
                     char* target = static_cast<char*>(receive) + offset;
                     if (rank == 0) std::memset(target, 0, piece);
                     sum(target, data, piece);
                   });
  });
}

int ncclBroadcast(const void* send, void* receive, size_t count, int type, int root, ncclComm* comm,
                  cudaStream_t stream) {
  const size_t bytes = count * size_of(type);
  if (size_of(type) == 0) return kInvalidArgument;
  // The data of the other ranks is ignored, but must be readable memory.
  const void* own = comm->rank == root ? send : receive;
  return put(stream, "ncclBroadcast", comm, [=] {
    comm->exchange(static_cast<const char*>(own), bytes, [&](int rank, size_t offset, const char* data, size_t piece) {
      if (rank == root) std::memcpy(static_cast<char*>(receive) + offset, data, piece);
    });
  });
}
int ncclBcast(void* memory, size_t count, int type, int root, ncclComm* comm, cudaStream_t stream) {
  return ncclBroadcast(memory, memory, count, type, root, comm, stream);
}

}  // extern "C"
