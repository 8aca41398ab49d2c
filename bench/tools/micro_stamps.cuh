// The persistent forward, instrumented with clocks. Compiles the source of the kernel with the functions called at phase
// boundaries replaced by wrappers that record the time. For micro.cu.
#pragma once

#include "../../csrc/cuda/ptx.cuh"

namespace bnk {

// Phase boundaries of a CTA.
enum Point : int { kBegin, kExchanges, kWaits, kHasWaited, kHasExchanged, kHasStored, kEnd };

struct Stamp {
  int point;
  long long clock;  // of the multiprocessor: comparable between its blocks
};

struct BlockTimes {
  unsigned multiprocessor;
  int count;                            // number of stamps
  unsigned long long begin_ns, end_ns;  // device time
};

struct Stamps {
  BlockTimes* blocks;
  Stamp* stamps;
  int capacity;  // stamps per CTA
};

// State of this CTA; used by its first thread.
struct StampState {
  Stamp* next;
  Stamp* end;
};

BNK_DEVICE StampState& stamp_state() {
  __shared__ StampState state;
  return state;
}

BNK_DEVICE void stamp(Point point) {
  if (threadIdx.x != 0) return;
  StampState& state = stamp_state();
  if (state.next < state.end) *state.next++ = {point, clock64()};
}

BNK_DEVICE unsigned long long nanoseconds() {
  unsigned long long value;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value));
  return value;
}

BNK_DEVICE void stamped_group_barrier(unsigned* counter, unsigned group_size, unsigned rank) {
  stamp(kWaits);
  group_barrier(counter, group_size, rank);
  stamp(kHasWaited);
}

BNK_DEVICE void stamped_cluster_barrier() {
  stamp(kWaits);
  cluster_barrier();
  stamp(kHasWaited);
}

}  // namespace bnk

#define group_barrier stamped_group_barrier
#define cluster_barrier stamped_cluster_barrier
#include "../../csrc/cuda/device/persistent.cuh"
#undef group_barrier
#undef cluster_barrier

namespace bnk {

template <Layout kLayout, typename... Args>
BNK_DEVICE void stamped_exchange(Args&&... args) {
  stamp(kExchanges);
  exchange<kLayout>(static_cast<Args&&>(args)...);
  stamp(kHasExchanged);
}

template <int kTile, typename... Args>
BNK_DEVICE void stamped_revisit_vectors(Args&&... args) {
  revisit_vectors<kTile>(static_cast<Args&&>(args)...);
  stamp(kHasStored);
}

}  // namespace bnk

// Turns the kernel into a device function that the kernel below calls.
#pragma push_macro("BNK_KERNEL")
#undef BNK_KERNEL
#define BNK_KERNEL(max_threads, min_blocks) __device__ __forceinline__ void
#define exchange stamped_exchange
#define revisit_vectors stamped_revisit_vectors
#include "../../csrc/cuda/kernels/persistent_forward.cuh"
#undef exchange
#undef revisit_vectors
#pragma pop_macro("BNK_KERNEL")

#include "../../csrc/cuda/launch/persistent.h"

namespace bnk {

template <Layout kLayout>
__global__ void __launch_bounds__(persistent_threads(kLayout), kMinBlocksPerMultiprocessor)
    stamped_forward(PersistentForwardParams params, Stamps stamps) {
  BlockTimes& times = stamps.blocks[blockIdx.x];
  Stamp* const first = stamps.stamps + static_cast<int64_t>(blockIdx.x) * stamps.capacity;
  if (threadIdx.x == 0) {
    stamp_state() = {first, first + stamps.capacity};
    asm volatile("mov.u32 %0, %%smid;" : "=r"(times.multiprocessor));
    times.begin_ns = nanoseconds();
  }
  stamp(kBegin);
  persistent_forward_kernel<BFloat16, kLayout, false>(params);
  stamp(kEnd);
  if (threadIdx.x == 0) {
    times.end_ns = nanoseconds();
    times.count = static_cast<int>(stamp_state().next - first);
  }
}

}  // namespace bnk
