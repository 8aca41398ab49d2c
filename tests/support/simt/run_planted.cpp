// run_planted KERNEL [grid block seeds schedule resident]: runs one kernel of planted.h with seeds 0 .. seeds-1 and
// prints the outcome as `key: value` lines:
//   fault    the engine's message for the first seed that ended in a fault (no more seeds are run)
//   differs  the first seed whose results are not bitwise equal to those of seed 0
//   wrong    the first seed whose results are wrong
//   traffic  bytes of x and y that the last launch read and wrote
// and "sound" if none of the first three was printed. Sanitizers report through stderr and the exit code.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "simt/planted.h"

namespace {

using namespace planted;

constexpr int kCount = 131;  // 32 vectors and a tail of 3

struct Kernel {
  void (*run)(Params);
  // The result that is checked: y (kCount), partial (one per block, or sums over clusters of two blocks) or sum.
  enum Result { kY, kPartial, kPairs, kSum, kFirstOfY, kAllOfY } result;
};

const std::map<std::string, Kernel>& kernels() {
  static const std::map<std::string, Kernel> all{
      {"block_sum", {block_sum<BlockSum::kSound>, Kernel::kPartial}},
      {"block_sum/no_barrier", {block_sum<BlockSum::kNoBarrier>, Kernel::kPartial}},
      {"block_sum/no_second_barrier", {block_sum<BlockSum::kNoSecondBarrier>, Kernel::kPartial}},
      {"block_sum/reads_unwritten", {block_sum<BlockSum::kReadsUnwritten>, Kernel::kPartial}},
      {"block_sum/writes_outside", {block_sum<BlockSum::kWritesOutside>, Kernel::kPartial}},
      {"block_sum/index_outside", {block_sum<BlockSum::kIndexOutside>, Kernel::kPartial}},
      {"block_sum/too_much_shared", {block_sum<BlockSum::kTooMuchShared>, Kernel::kPartial}},
      {"grid_sum", {grid_sum<GridSum::kSound>, Kernel::kSum}},
      {"grid_sum/no_wait", {grid_sum<GridSum::kNoWait>, Kernel::kSum}},
      {"grid_sum/no_arrival", {grid_sum<GridSum::kNoArrival>, Kernel::kSum}},
      {"grid_sum/waits_for_too_many", {grid_sum<GridSum::kWaitsForTooMany>, Kernel::kSum}},
      {"cluster_sum", {cluster_sum<ClusterSum::kSound>, Kernel::kPairs}},
      {"cluster_sum/no_barrier", {cluster_sum<ClusterSum::kNoBarrier>, Kernel::kPairs}},
      {"cluster_sum/no_barrier_at_end", {cluster_sum<ClusterSum::kNoBarrierAtEnd>, Kernel::kPairs}},
      {"cluster_sum/no_such_block", {cluster_sum<ClusterSum::kNoSuchBlock>, Kernel::kPairs}},
      {"cluster_sum/no_such_array", {cluster_sum<ClusterSum::kNoSuchArray>, Kernel::kPairs}},
      {"cluster_sum/two_barriers", {cluster_sum<ClusterSum::kTwoBarriers>, Kernel::kPairs}},
      {"cluster_sum/early_return", {cluster_sum<ClusterSum::kEarlyReturn>, Kernel::kPairs}},
      {"scale", {scale<Scale::kSound>, Kernel::kY}},
      {"scale/no_tail", {scale<Scale::kNoTail>, Kernel::kY}},
      {"scale/tail_too_long", {scale<Scale::kTailTooLong>, Kernel::kY}},
      {"scale/reads_before", {scale<Scale::kReadsBefore>, Kernel::kY}},
      {"scale/reads_far", {scale<Scale::kReadsFar>, Kernel::kY}},
      {"scale/writes_far", {scale<Scale::kWritesFar>, Kernel::kY}},
      {"scale/no_such_memory", {scale<Scale::kNoSuchMemory>, Kernel::kY}},
      {"scale/misaligned", {scale<Scale::kMisaligned>, Kernel::kY}},
      {"scale/past_the_primitives", {scale<Scale::kPastPrimitives>, Kernel::kY}},
      {"scale/writes_input", {scale<Scale::kWritesInput>, Kernel::kY}},
      {"race", {race<Race::kSound>, Kernel::kFirstOfY}},
      {"race/shared", {race<Race::kShared>, Kernel::kFirstOfY}},
      {"race/shared_read_write", {race<Race::kSharedReadWrite>, Kernel::kFirstOfY}},
      {"race/global_across_blocks", {race<Race::kGlobalAcrossBlocks>, Kernel::kFirstOfY}},
      {"race/global_vector", {race<Race::kGlobalVector>, Kernel::kFirstOfY}},
      {"race/shuffle_as_barrier", {race<Race::kShuffleAsBarrier>, Kernel::kFirstOfY}},
      {"meeting", {meeting<Meeting::kSound>, Kernel::kAllOfY}},
      {"meeting/two_barriers", {meeting<Meeting::kTwoBarriers>, Kernel::kAllOfY}},
      {"meeting/early_return", {meeting<Meeting::kEarlyReturn>, Kernel::kAllOfY}},
      {"meeting/late_return", {meeting<Meeting::kLateReturn>, Kernel::kAllOfY}},
      {"meeting/barrier_in_branch", {meeting<Meeting::kBarrierInBranch>, Kernel::kAllOfY}},
      {"meeting/lane_missing", {meeting<Meeting::kLaneMissing>, Kernel::kAllOfY}},
      {"meeting/lane_at_barrier", {meeting<Meeting::kLaneAtBarrier>, Kernel::kAllOfY}},
      {"meeting/two_shuffles", {meeting<Meeting::kTwoShuffles>, Kernel::kAllOfY}},
      {"meeting/lane_returned", {meeting<Meeting::kLaneReturned>, Kernel::kAllOfY}},
  };
  return all;
}

float input(int i) { return static_cast<float>(i % 7 + 1); }

// Every right result is a small integer, exact in any order of summation.
bool right(Kernel::Result result, const simt::Launch& launch, const float* y, const float* partial, float sum) {
  const int blocks = static_cast<int>(launch.grid);
  const int block = static_cast<int>(launch.block);
  bool good = true;
  switch (result) {
    case Kernel::kY:
      for (int i = 0; i < kCount; ++i) good &= y[i] == 2 * input(i);
      return good;
    case Kernel::kPartial:
      for (int b = 0; b < blocks; ++b) {
        float total = 0;
        for (int i = b * block; i < (b + 1) * block && i < kCount; ++i) total += 3 * input(i);  // rounds 1 and 2
        good &= partial[b] == total;
      }
      return good;
    case Kernel::kPairs:
      for (int b = 0; b < blocks; ++b) good &= partial[b] == input(b) + input(b ^ 1);
      return good;
    case Kernel::kSum: {
      float total = 0;
      for (int b = 0; b < blocks; ++b) total += input(b);
      return sum == total;
    }
    case Kernel::kFirstOfY:
      return y[0] == 1;
    case Kernel::kAllOfY:
      for (int b = 0; b < blocks; ++b) {
        for (int t = 0; t < block; ++t) good &= y[b * block + t] == static_cast<float>(t + (t ^ 1));
      }
      return good;
  }
  return false;
}

simt::Schedule schedule_named(const std::string& name) {
  static const std::map<std::string, simt::Schedule> all{{"seeded", simt::Schedule::kSeeded},
                                                         {"in_order", simt::Schedule::kInOrder},
                                                         {"reverse", simt::Schedule::kReverse},
                                                         {"stall_one", simt::Schedule::kStallOne}};
  return all.at(name);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    for (const auto& [name, kernel] : kernels()) std::printf("%s\n", name.c_str());
    return 0;
  }
  const auto argument = [&](int i, const char* otherwise) { return std::string(i < argc ? argv[i] : otherwise); };
  const Kernel& kernel = kernels().at(argv[1]);
  simt::Launch launch{.grid = static_cast<unsigned>(std::stoul(argument(2, "2"))),
                      .block = static_cast<unsigned>(std::stoul(argument(3, "64"))),
                      .cluster = kernel.result == Kernel::kPairs ? 2u : 1u,
                      .schedule = schedule_named(argument(5, "seeded")),
                      .resident_blocks = static_cast<unsigned>(std::stoul(argument(6, "0")))};
  const auto seeds = std::stoul(argument(4, "20"));
  const size_t results = std::max<size_t>(kCount, size_t{launch.grid} * launch.block);

  simt::Buffer x("x", kCount * sizeof(float));
  simt::Buffer y("y", results * sizeof(float));
  simt::Buffer partial("partial", launch.grid * sizeof(float));
  simt::Buffer sum("sum", sizeof(float));
  simt::Buffer counter("counter", sizeof(unsigned));
  for (int i = 0; i < kCount; ++i) x.host<float>()[i] = input(i);

  std::vector<char> first;
  simt::Report report;
  bool differs = false, wrong = false;
  for (launch.seed = 0; launch.seed < seeds; ++launch.seed) {
    for (simt::Buffer* buffer : {&y, &partial, &sum}) buffer->poison();
    *counter.host<unsigned>() = 0;
    report = simt::launch(launch, [&] {
      kernel.run({x.device<float>(), y.device<float>(), partial.device<float>(), sum.device<float>(),
                  counter.device<unsigned>(), kCount});
    });
    if (!report.ok()) {
      std::printf("fault: %s\n", report.fault.c_str());
      return 1;
    }
    std::vector<char> outputs;
    for (const simt::Buffer* buffer : {&y, &partial, &sum}) {
      outputs.insert(outputs.end(), buffer->host<char>(), buffer->host<char>() + buffer->bytes());
    }
    if (launch.seed == 0) first = outputs;
    if (!differs && outputs != first) {
      differs = true;
      std::printf("differs: %zu\n", static_cast<size_t>(launch.seed));
    }
    if (!wrong && !right(kernel.result, launch, y.host<float>(), partial.host<float>(), *sum.host<float>())) {
      wrong = true;
      std::printf("wrong: %zu\n", static_cast<size_t>(launch.seed));
    }
  }
  std::printf("traffic: x %zu %zu y %zu %zu\n", report.read("x"), report.written("x"), report.read("y"),
              report.written("y"));
  if (differs || wrong) return 1;
  std::printf("sound\n");
  return 0;
}
