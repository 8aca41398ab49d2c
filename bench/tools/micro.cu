// Measures the constants of csrc/plan/persistent.cpp on a GPU. bench/tools/micro.py compiles and runs this program.
//
//   micro barrier      a barrier of a grid group in global memory (ptx_cuda.cuh), by group size
//   micro cluster      a barrier of a cluster, by cluster size
//   micro launch       the cost of a launch: plain, cooperative, with clusters; from the host, and in a graph
//   micro runs         bandwidth if a CTA accesses rows in runs of 32 to 1024 bytes
//   micro phases OUTER CHANNELS INNER LAYOUT THREADS_C BLOCK GROUP_SIZE GROUPS CACHED_VECTORS TWO_SHOT CLUSTER
//                      when each CTA of the persistent forward loads, exchanges and stores: bfloat16, numbers of a plan
//
// Each prints lines of JSON. Exit status: 0 measured, 1 a CUDA call failed, 2 unknown arguments.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cuda/ptx.cuh"
#include "micro_stamps.cuh"

namespace {

using bnk::CacheOp;

#define CHECK(call)                                                                           \
  do {                                                                                        \
    const cudaError_t error = (call);                                                         \
    if (error != cudaSuccess) {                                                               \
      std::fprintf(stderr, "%s: %s (line %d)\n", #call, cudaGetErrorString(error), __LINE__); \
      std::exit(1);                                                                           \
    }                                                                                         \
  } while (false)

constexpr int kThreads = 256;
constexpr int kRepeats = 7;
constexpr int kCounterWords = bnk::kBarrierWordBytes / sizeof(unsigned);

int attribute(cudaDeviceAttr which) {
  int value = 0;
  CHECK(cudaDeviceGetAttribute(&value, which, 0));
  return value;
}

int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

template <typename T>
T* allocate(size_t count) {
  void* memory = nullptr;
  CHECK(cudaMalloc(&memory, count * sizeof(T)));
  CHECK(cudaMemset(memory, 0, count * sizeof(T)));
  return static_cast<T*>(memory);
}

// Median seconds of `work`, which enqueues on the default stream, after one call to warm up.
double seconds(const std::function<void()>& work) {
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  std::vector<float> samples;
  for (int i = 0; i <= kRepeats; ++i) {
    CHECK(cudaEventRecord(start));
    work();
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, start, end));
    if (i > 0) samples.push_back(milliseconds);
  }
  std::nth_element(samples.begin(), samples.begin() + kRepeats / 2, samples.end());
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(end));
  return samples[kRepeats / 2] * 1e-3;
}

enum class Launch { kPlain, kCooperative, kCluster };

template <typename... Params, typename... Args>
void launch(Launch how, int grid, int block, size_t shared, int cluster, cudaStream_t stream, void (*kernel)(Params...),
            Args... args) {
  cudaLaunchAttribute attribute{};
  if (how == Launch::kCooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = how == Launch::kPlain ? 0 : 1;
  CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}

// ---- barriers

constexpr int kFields = 3;  // doubles in the partial of a channel: count, mean, sum of squares

// Rounds of one barrier per group. With kExchange, every CTA also stores a partial of one channel before the barrier and
// reads those of all CTAs after it.
template <bool kExchange>
__global__ void __launch_bounds__(kThreads)
    group_barriers(unsigned* counters, double* partials, int group_size, int rounds, double* sink) {
  const int group = blockIdx.x / group_size;
  const int rank = blockIdx.x % group_size;
  double sum = 0;
  for (int round = 0; round < rounds; ++round) {
    // Two buffers alternate: while a CTA reads one, no other CTA can write the next round but one.
    double* partial = partials + (static_cast<int64_t>(group) * 2 + round % 2) * kFields * group_size;
    if constexpr (kExchange) {
      if (threadIdx.x < kFields) bnk::store(partial + rank * kFields + threadIdx.x, sum + rank);
    }
    bnk::group_barrier(counters + kCounterWords * group, group_size, rank);
    if constexpr (kExchange) {
      for (int i = threadIdx.x; i < kFields * group_size; i += blockDim.x) sum += bnk::load(partial + i);
      bnk::block_barrier();
    }
  }
  if (sum < 0) *sink = sum;  // prevents elimination of the reads
}

template <bool kExchange>
__global__ void __launch_bounds__(kThreads) cluster_barriers(int group_size, int rounds, double* sink) {
  BNK_SHARED(double, partials, 2 * kFields);
  double sum = 0;
  for (int round = 0; round < rounds; ++round) {
    double* local_partial = partials + round % 2 * kFields;
    if constexpr (kExchange) {
      if (threadIdx.x == 0) local_partial[0] = local_partial[1] = local_partial[2] = sum + round;
    }
    bnk::cluster_barrier();
    if constexpr (kExchange) {
      if (threadIdx.x == 0) {
        for (int rank = 0; rank < group_size; ++rank) {
          for (int field = 0; field < kFields; ++field) sum += bnk::load_dsmem(local_partial + field, rank);
        }
      }
      bnk::block_barrier();
    }
  }
  bnk::cluster_barrier();  // no CTA exits while another reads its shared memory
  if (sum < 0) *sink = sum;
}

// Seconds per round, from the difference of many and few rounds, which cancels the launch.
template <typename Rounds>
double seconds_per_round(const Rounds& run) {
  constexpr int kFew = 100;
  constexpr int kMany = 600;
  const double few = seconds([&] { run(kFew); });
  return (seconds([&] { run(kMany); }) - few) / (kMany - kFew);
}

void print_barrier(const char* what, int group_size, int groups, double barrier, double exchange) {
  std::printf("{\"what\": \"%s\", \"group_size\": %d, \"groups\": %d, \"barrier_ns\": %.1f, \"exchange_ns\": %.1f}\n",
              what, group_size, groups, barrier * 1e9, exchange * 1e9);
  std::fflush(stdout);
}

void measure_barrier() {
  const int blocks = 2 * (multiprocessors() - multiprocessors() / 16);  // as in plans
  unsigned* counters = allocate<unsigned>(static_cast<size_t>(kCounterWords) * blocks);
  double* partials = allocate<double>(static_cast<size_t>(2) * kFields * blocks);
  double* sink = allocate<double>(1);
  for (int group_size = 2; group_size <= blocks; group_size = group_size < 16   ? 2 * group_size
                                                              : group_size < 31 ? 31
                                                                                : 2 * group_size) {
    for (const int groups : {1, blocks / group_size}) {
      const auto run = [&](auto kernel) {
        return seconds_per_round([&](int rounds) {
          launch(Launch::kCooperative, groups * group_size, kThreads, 0, 1, nullptr, kernel, counters, partials,
                 group_size, rounds, sink);
        });
      };
      print_barrier("barrier", group_size, groups, run(group_barriers<false>), run(group_barriers<true>));
      if (blocks / group_size == 1) break;
    }
  }
}

void measure_cluster() {
  double* sink = allocate<double>(1);
  for (int group_size = 2; group_size <= 8; group_size *= 2) {
    for (const int groups : {1, 2 * multiprocessors() / 16 * (16 / group_size)}) {
      const auto run = [&](auto kernel) {
        return seconds_per_round([&](int rounds) {
          launch(Launch::kCluster, groups * group_size, kThreads, 0, group_size, nullptr, kernel, group_size, rounds,
                 sink);
        });
      };
      print_barrier("cluster", group_size, groups, run(cluster_barriers<false>), run(cluster_barriers<true>));
    }
  }
}

// ---- launches

__global__ void __launch_bounds__(kThreads) nothing(int) {}

void measure_launch() {
  constexpr int kInGraph = 100;
  const std::pair<const char*, Launch> ways[] = {
      {"plain", Launch::kPlain}, {"cooperative", Launch::kCooperative}, {"cluster", Launch::kCluster}};
  cudaStream_t stream;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (const auto& [name, how] : ways) {
    const auto many = [&, how = how](cudaStream_t on) {
      for (int i = 0; i < kInGraph; ++i) launch(how, 2 * multiprocessors() / 8 * 8, kThreads, 0, 8, on, nothing, i);
    };
    many(nullptr);
    CHECK(cudaDeviceSynchronize());
    const auto begin = std::chrono::steady_clock::now();
    many(nullptr);
    const std::chrono::duration<double> host = std::chrono::steady_clock::now() - begin;
    const double device = seconds([&] { many(nullptr); });
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    many(stream);
    cudaGraph_t graph;
    CHECK(cudaStreamEndCapture(stream, &graph));
    cudaGraphExec_t replay;
    CHECK(cudaGraphInstantiate(&replay, graph, 0));
    const double replayed = seconds([&] { CHECK(cudaGraphLaunch(replay, nullptr)); });
    std::printf("{\"what\": \"launch\", \"how\": \"%s\", \"host_us\": %.3f, \"stream_us\": %.3f, \"graph_us\": %.3f}\n",
                name, host.count() * 1e6 / kInGraph, device * 1e6 / kInGraph, replayed * 1e6 / kInGraph);
    std::fflush(stdout);
  }
}

// ---- runs

__global__ void fill(uint16_t* x, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    const uint32_t hash = static_cast<uint32_t>(i * 2654435761u) ^ static_cast<uint32_t>(i >> 7);
    x[i] = static_cast<uint16_t>(__float_as_uint(static_cast<float>(hash & 0xffffu) / 32768.0f - 1.0f) >> 16);
  }
}

// bfloat16 numbers from -1 to 1: accesses of zeros can be faster than those of real data.
template <typename T>
T* allocate_numbers(int64_t bytes) {
  T* memory = allocate<T>(bytes / sizeof(T));
  fill<<<4 * multiprocessors(), kThreads>>>(reinterpret_cast<uint16_t*>(memory), bytes / 2);
  CHECK(cudaGetLastError());
  return memory;
}

using Vector = bnk::Vector<float>;
constexpr int kInFlight = 4;

// A matrix of rows. All CTAs process one channel tile after another, as the groups of a channels-last plan do. A channel tile
// is `run` vectors wide: the run of a row that a CTA accesses at once.
template <bool kLoads, bool kStores>
__global__ void __launch_bounds__(kThreads)
    access_runs(const float* in, float* out, int64_t rows, int row, int run, unsigned* sink) {
  const int64_t split = (rows + gridDim.x - 1) / gridDim.x;
  const int64_t first = split * blockIdx.x;
  const int64_t last = first + split < rows ? first + split : rows;
  const int step = blockDim.x / run;
  unsigned seen = 0;
  for (int channel_tile = 0; channel_tile < row / run; ++channel_tile) {
    const int column = channel_tile * run + threadIdx.x % run;
    for (int64_t at = first + threadIdx.x / run; at < last; at += static_cast<int64_t>(step) * kInFlight) {
      Vector values[kInFlight] = {};
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (kLoads && at + i * step < last)
          values[i] = bnk::load_vector<CacheOp::kStreaming>(in + ((at + i * step) * row + column) * 4);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        seen |= values[i].words[0];
        if (kStores && at + i * step < last)
          bnk::store_vector<CacheOp::kStreaming>(out + ((at + i * step) * row + column) * 4, values[i]);
      }
    }
  }
  if (seen == 1) *sink = seen;  // prevents elimination of the loads
}

void measure_runs() {
  constexpr int64_t kBytes = int64_t{512} << 20;
  constexpr int kRowBytes = 1024;
  const int64_t rows = kBytes / kRowBytes;
  float* in = allocate_numbers<float>(kBytes);
  float* out = allocate<float>(kBytes / 4);
  unsigned* sink = allocate<unsigned>(1);
  for (int bytes = 32; bytes <= kRowBytes; bytes *= 2) {
    const auto measure = [&](const char* access, int tensors, auto kernel) {
      const double time = seconds([&] {
        launch(Launch::kPlain, 2 * multiprocessors(), kThreads, 0, 1, nullptr, kernel, in, out, rows, kRowBytes / 16,
               bytes / 16, sink);
      });
      std::printf("{\"what\": \"runs\", \"access\": \"%s\", \"run_bytes\": %d, \"gb_per_s\": %.1f}\n", access, bytes,
                  static_cast<double>(tensors * kBytes) / time * 1e-9);
      std::fflush(stdout);
    };
    measure("load", 1, access_runs<true, false>);
    measure("store", 1, access_runs<false, true>);
    measure("copy", 2, access_runs<true, true>);
  }
}

// ---- phases

bnk::Layout layout_of(const std::string& name) {
  return name == "packed"          ? bnk::Layout::kPacked
         : name == "channels_last" ? bnk::Layout::kChannelsLast
                                   : bnk::Layout::kChannelsFirst;
}

using Stamped = void (*)(bnk::PersistentForwardParams, bnk::Stamps);

Stamped kernel_of(bnk::Layout layout) {
  switch (layout) {
    case bnk::Layout::kPacked:
      return bnk::stamped_forward<bnk::Layout::kPacked>;
    case bnk::Layout::kChannelsLast:
      return bnk::stamped_forward<bnk::Layout::kChannelsLast>;
    default:
      return bnk::stamped_forward<bnk::Layout::kChannelsFirst>;
  }
}

void measure_phases(char** words) {
  const auto number = [&](int i) { return std::atoll(words[i]); };
  const bnk::Problem problem{number(0), number(1), number(2), bnk::Dtype::kBFloat16};
  const bnk::PersistentChoice choice{layout_of(words[3]),
                                     static_cast<int>(number(4)),
                                     static_cast<int>(number(5)),
                                     static_cast<int>(number(6)),
                                     static_cast<int>(number(7)),
                                     static_cast<int>(number(8)),
                                     number(9) != 0,
                                     number(10) != 0};
  const bnk::PersistentPlan plan = bnk::make_persistent(problem, true, bnk::Pass::kForwardTrain, choice);
  uint16_t* x = allocate_numbers<uint16_t>(2 * problem.elements());
  uint16_t* y = allocate<uint16_t>(problem.elements());
  double* scratch = allocate<double>(bnk::persistent::forward_scratch(plan) + 1);
  void* workspace = allocate<char>(bnk::kBarrierWords * bnk::kBarrierWordBytes);
  float* statistics = allocate<float>(2 * problem.channels);
  bnk::ForwardTrainArgs args{};
  args.eps = 1e-5;
  args.mean = {statistics, bnk::Dtype::kFloat32};
  args.invstd = {statistics + problem.channels, bnk::Dtype::kFloat32};
  const bnk::PersistentForwardParams params{.partition = plan.partition,
                                            .persistent = bnk::persistent::persistent_params(plan, scratch, workspace),
                                            .x = x,
                                            .y = y,
                                            .weight = {nullptr, bnk::Dtype::kFloat32},
                                            .bias = {nullptr, bnk::Dtype::kFloat32},
                                            .num_batches_tracked = nullptr,
                                            .results = bnk::results_of(args),
                                            .epilogue = {}};
  const int64_t rounds = (plan.partition.channel_tiles.value + plan.groups - 1) / plan.groups;
  const int capacity = static_cast<int>(2 + 7 * rounds);
  const int blocks = static_cast<int>(plan.launch.grid);
  const bnk::Stamps stamps{allocate<bnk::BlockTimes>(blocks), allocate<bnk::Stamp>(size_t(blocks) * capacity),
                           capacity};
  const Stamped kernel = kernel_of(plan.partition.layout);
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes)));
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  const Launch how = plan.group == bnk::GroupKind::kCta       ? Launch::kPlain
                     : plan.group == bnk::GroupKind::kCluster ? Launch::kCluster
                                                              : Launch::kCooperative;
  const double time = seconds([&] {
    launch(how, blocks, plan.launch.block, plan.shared_bytes, plan.group_size, nullptr, kernel, params, stamps);
  });

  std::vector<bnk::BlockTimes> times(blocks);
  std::vector<bnk::Stamp> all(size_t(blocks) * capacity);
  CHECK(cudaMemcpy(times.data(), stamps.blocks, times.size() * sizeof times[0], cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(all.data(), stamps.stamps, all.size() * sizeof all[0], cudaMemcpyDeviceToHost));
  std::printf("{\"what\": \"whole\", \"us\": %.2f, \"blocks\": %d, \"rounds\": %lld}\n", time * 1e6, blocks,
              static_cast<long long>(rounds));
  for (int block = 0; block < blocks; ++block) {
    const bnk::BlockTimes& one = times[block];
    std::printf("{\"what\": \"block\", \"sm\": %u, \"begin_ns\": %llu, \"end_ns\": %llu, \"stamps\": [",
                one.multiprocessor, one.begin_ns, one.end_ns);
    for (int i = 0; i < one.count && i < capacity; ++i) {
      const bnk::Stamp& stamp = all[size_t(block) * capacity + i];
      std::printf("%s[%d, %lld]", i == 0 ? "" : ", ", stamp.point, static_cast<long long>(stamp.clock));
    }
    std::printf("]}\n");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  const std::pair<const char*, void (*)()> measurements[] = {
      {"barrier", measure_barrier}, {"cluster", measure_cluster}, {"launch", measure_launch}, {"runs", measure_runs}};
  for (const auto& [name, measure] : measurements) {
    if (what != name) continue;
    measure();
    return 0;
  }
  if (what == "phases" && argc == 13) {
    measure_phases(argv + 2);
    return 0;
  }
  std::fprintf(stderr, "usage: micro barrier|cluster|launch|runs, or micro phases and 11 numbers of a plan\n");
  return 2;
}
