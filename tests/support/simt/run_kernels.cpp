// run_kernels: a server that runs the launch sequences of both paths (csrc/cuda/launch/two_pass.h,
// csrc/cuda/launch/persistent.h) on the engine.
//
// Reads requests from stdin and writes answers to stdout until stdin ends. A request is a line of words
//
//   OPERATION key=value ... tensor=NAME:MODE:DTYPE:BYTES:MISALIGNMENT:TAIL ...
//
// followed by the bytes of its tensors of mode `in` and `inout`, in order. OPERATION is forward_train, forward_eval,
// backward or an operation of sync_steps.h. A tensor's NAME is a field of the operation's arguments (problem.h); fields
// that are not named are null. A nonzero TAIL makes the tensor sparse: it is zero except for its last TAIL bytes, and
// only these are sent. The keys:
//
//   outer channels inner dtype        the problem
//   momentum cumulative eps training relu     as in problem.h
//   block splits                      the plan: make_two_pass()
//   multiprocessors threads           the plan: plan_two_pass(), instead of block and splits
//   layout threads_c block group_size groups cached_vectors two_shot cluster
//                                     the persistent kernel: make_persistent()
//   limits                            the plan: plan_pass() for a device; the fields of DeviceLimits, comma-separated
//   only_plan                         with limits: only answers the plan, for an aligned x; needs no tensors
//   finalize_block grid               the block size of the finalize kernels; a limit for every grid
//   seeds first_seed schedule         each seed is one run of the sequence, on newly poisoned memory
//   at_a_time                         blocks of a launch that run at the same time, except persistent launches; 0: all
//   co_resident                       the same for persistent launches
//   last_blocks                       runs only this many blocks of each grid, from its end
//   without                           LAUNCH:FILE:LINE, a barrier that one launch of the sequence skips; LAUNCH `all`:
//                                     every launch
//   workspace                         a name for the barrier workspace: zero when the name is new, otherwise as the
//                                     last request left it
//
// An answer is lines of text, then the bytes of the tensors of mode `inout` and `out`, in order:
//
//   fault SEED LAUNCH TEXT            a launch ended in a fault (no bytes follow; '|' replaces line breaks in TEXT)
//   plan KEY=VALUE ...                with limits: the plan
//   differs SEED TENSOR BYTE          a run's results are not bitwise equal to the first run's (no bytes follow)
//   launch GRID BLOCK SWITCHES BARRIERS NAME:READ:WRITTEN ...
//                                     one per launch of the sequence. BARRIERS: the barriers that were reached, each
//                                     as FILE:LINE and a comma, then a dash; then the traffic of each buffer
//   done
//
// Traffic that differs between runs is also reported as a difference. It is a fault if a run of the persistent kernel
// leaves a barrier word in a state that the next run cannot use.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/launch/persistent.h"
#include "cuda/launch/two_pass.h"
#include "simt/engine.h"
#include "simt/request.h"
#include "simt/sync_steps.h"

namespace {

using simt::Request;
using simt::Tensor;

// The executor of the launch sequences: runs one launch after the other on the engine, and none after a fault.
class HostExecutor {
 public:
  HostExecutor(const Request& request, uint64_t seed)
      : seed_(seed),
        schedule_(simt::schedule_named(request.options.at("schedule"))),
        active_blocks_(static_cast<unsigned>(request.integer("at_a_time", 0))),
        co_resident_(static_cast<unsigned>(request.integer("co_resident", 0))),
        last_blocks_(request.integer("last_blocks", 0)) {
    const auto without = request.options.find("without");
    if (without == request.options.end()) return;
    const size_t colon = without->second.find(':');
    const std::string launch = without->second.substr(0, colon);
    without_everywhere_ = launch == "all";
    if (!without_everywhere_) without_launch_ = std::stoul(launch);
    without_ = without->second.substr(colon + 1);
  }

  // All blocks of a persistent plan run at the same time, as in a cooperative launch, unless a test verifies that they
  // must.
  template <typename Params>
  void launch(const bnk::PersistentPlan& plan, void (*kernel)(Params), const Params& params) {
    launch(plan.launch, kernel, params, static_cast<size_t>(plan.shared_bytes), co_resident_,
           plan.group == bnk::GroupKind::kCluster ? static_cast<unsigned>(plan.group_size) : 1);
  }

  template <typename Params>
  void launch(bnk::Launch launch, void (*kernel)(Params), const Params& params) {
    this->launch(launch, kernel, params, 0, active_blocks_, 1);
  }

  template <typename Params>
  void launch(bnk::Launch launch, void (*kernel)(Params), const Params& params, size_t dynamic, unsigned persistent,
              unsigned cluster) {
    if (!fault.empty()) return;
    const int64_t blocks = last_blocks_ == 0 ? launch.grid : std::min(last_blocks_, launch.grid);
    const auto grid = static_cast<unsigned>(blocks);
    const auto block = static_cast<unsigned>(launch.block);
    const simt::Report report =
        simt::launch({.grid = grid,
                      .block = block,
                      .cluster = cluster,
                      .seed = 8 * seed_ + count,
                      .schedule = schedule_,
                      .dynamic_bytes = dynamic,
                      .resident_blocks = persistent,
                      .first_block = static_cast<size_t>(launch.grid - blocks),
                      .of_blocks = static_cast<size_t>(launch.grid),
                      .without = without_everywhere_ || count == without_launch_ ? without_ : ""},
                     [&] { kernel(params); });
    std::ostringstream line;
    line << "launch " << grid << ' ' << block << ' ' << report.switches << ' ';
    for (const std::string& barrier : report.barriers) line << barrier << ',';
    line << '-';
    for (const simt::Traffic& entry : report.traffic) {
      line << ' ' << entry.buffer << ':' << entry.bytes_read << ':' << entry.bytes_written;
    }
    lines.push_back(line.str());
    fault = report.fault;
    ++count;
  }

  unsigned count = 0;
  std::string fault;
  std::vector<std::string> lines;

 private:
  uint64_t seed_;
  simt::Schedule schedule_;
  unsigned active_blocks_;
  unsigned co_resident_;
  int64_t last_blocks_;
  size_t without_launch_ = 0;
  bool without_everywhere_ = false;
  std::string without_;
};

bool is_aligned(const Request& request) { return bnk::two_pass::is_aligned(request.data("x")); }

// The plan for a device, if the request has the key `limits`.
std::optional<bnk::Plan> plan_for_device(const Request& request) {
  const auto limits = request.options.find("limits");
  if (limits == request.options.end()) return std::nullopt;
  return bnk::plan_pass(request.problem(), pass_of(request), is_aligned(request), simt::limits_of(limits->second), {});
}

// The persistent kernel's plan, if the request selects that path.
std::optional<bnk::PersistentPlan> persistent_plan(const Request& request) {
  const bnk::Problem problem = request.problem();
  const bnk::Pass pass = pass_of(request);
  if (const auto plan = plan_for_device(request)) {
    return plan->path == bnk::Path::kPersistent ? std::optional(plan->persistent) : std::nullopt;
  }
  if (!request.options.count("layout") || pass == bnk::Pass::kForwardEval || pass == bnk::Pass::kBackwardEval) {
    return std::nullopt;
  }
  const auto number = [&](const char* key) { return static_cast<int>(request.integer(key, 0)); };
  return bnk::make_persistent(
      problem, is_aligned(request), pass,
      {simt::layout_named(request.options.at("layout")), number("threads_c"), number("block"), number("group_size"),
       number("groups"), number("cached_vectors"), number("two_shot") != 0, number("cluster") != 0});
}

bnk::TwoPassPlan two_pass_plan(const Request& request) {
  const bnk::Problem problem = request.problem();
  const bool aligned = is_aligned(request);
  if (const auto plan = plan_for_device(request)) return plan->two_pass;
  bnk::TwoPassPlan plan =
      request.options.count("multiprocessors")
          ? bnk::plan_two_pass(problem, aligned,
                               {.multiprocessors = static_cast<int>(request.integer("multiprocessors", 0)),
                                .max_threads_per_multiprocessor = static_cast<int>(request.integer("threads", 0))})
          : bnk::make_two_pass(problem, aligned, static_cast<int>(request.integer("block", 0)),
                               request.integer("splits", 1));
  plan.finalize_launch.block = static_cast<int>(request.integer("finalize_block", plan.finalize_launch.block));
  for (bnk::Launch* launch : {&plan.tile_launch, &plan.finalize_launch}) {
    launch->grid = std::min(launch->grid, request.integer("grid", launch->grid));
  }
  return plan;
}

bnk::Epilogue epilogue_of(const Request& request) {
  return {.residual = request.data("residual"),
          .relu = request.integer("relu", 0) != 0,
          .low = request.vector("relu_low"),
          .high = request.vector("relu_high")};
}

void run_sequence(const Request& request, const bnk::TwoPassPlan& plan,
                  const std::optional<bnk::PersistentPlan>& persistent, simt::Buffer& scratch, simt::Buffer& workspace,
                  HostExecutor& executor) {
  scratch.poison();
  if (request.operation.starts_with("sync_")) {
    simt::run_sync(request, plan, scratch.device<double>(), executor);
  } else if (request.operation == "forward_train") {
    const bnk::ForwardTrainArgs args{.problem = request.problem(),
                                     .x = request.data("x"),
                                     .y = request.data("y"),
                                     .weight = request.vector("weight"),
                                     .bias = request.vector("bias"),
                                     .running_mean = request.vector("running_mean"),
                                     .running_var = request.vector("running_var"),
                                     .num_batches_tracked = static_cast<int64_t*>(request.data("num_batches_tracked")),
                                     .momentum = request.real("momentum"),
                                     .cumulative = request.integer("cumulative", 0) != 0,
                                     .eps = request.real("eps"),
                                     .mean = request.vector("mean"),
                                     .invstd = request.vector("invstd"),
                                     .epilogue = epilogue_of(request)};
    if (persistent) {
      bnk::persistent::forward_train(args, *persistent, scratch.device<double>(), workspace.device<void>(), executor);
    } else {
      bnk::two_pass::forward_train(args, plan, scratch.device<double>(), executor);
    }
  } else if (request.operation == "forward_eval") {
    const bnk::ForwardEvalArgs args{.problem = request.problem(),
                                    .x = request.data("x"),
                                    .y = request.data("y"),
                                    .weight = request.vector("weight"),
                                    .bias = request.vector("bias"),
                                    .running_mean = request.vector("running_mean"),
                                    .running_var = request.vector("running_var"),
                                    .eps = request.real("eps"),
                                    .mean = request.vector("mean"),
                                    .invstd = request.vector("invstd"),
                                    .epilogue = epilogue_of(request)};
    bnk::two_pass::forward_eval(args, plan, executor);
  } else {
    const bnk::BackwardArgs args{.problem = request.problem(),
                                 .grad_y = request.data("grad_y"),
                                 .x = request.data("x"),
                                 .grad_x = request.data("grad_x"),
                                 .weight = request.vector("weight"),
                                 .mean = request.vector("mean"),
                                 .invstd = request.vector("invstd"),
                                 .grad_weight = request.vector("grad_weight"),
                                 .grad_bias = request.vector("grad_bias"),
                                 .training = request.integer("training", 0) != 0,
                                 .relu_low = request.vector("relu_low"),
                                 .relu_high = request.vector("relu_high")};
    if (persistent && args.grad_x != nullptr) {
      bnk::persistent::backward(args, *persistent, scratch.device<double>(), workspace.device<void>(), executor);
    } else {
      bnk::two_pass::backward(args, plan, scratch.device<double>(), executor);
    }
  }
}

int64_t scratch_doubles(const Request& request, const bnk::TwoPassPlan& plan,
                        const std::optional<bnk::PersistentPlan>& persistent) {
  if (request.operation.starts_with("sync_")) return simt::sync_scratch(request, plan);
  if (request.operation == "forward_train") {
    return persistent ? bnk::persistent::forward_scratch(*persistent) : bnk::two_pass::forward_train_scratch(plan);
  }
  if (request.operation != "backward") return 0;
  return persistent && request.find("grad_x") ? bnk::persistent::backward_scratch(*persistent)
                                              : bnk::two_pass::backward_scratch(plan);
}

// Empty if the results and the traffic are equal; otherwise "TENSOR BYTE" or "traffic 0".
std::string difference(const Request& request, const std::vector<std::vector<char>>& first,
                       const HostExecutor& first_executor, const HostExecutor& executor) {
  for (size_t i = 0; i < request.tensors.size(); ++i) {
    const char* bytes = request.tensors[i].content();
    for (size_t byte = 0; byte < first[i].size(); ++byte) {
      if (bytes[byte] != first[i][byte]) return request.tensors[i].name + " " + std::to_string(byte);
    }
  }
  return first_executor.lines == executor.lines ? "" : "traffic 0";
}

// A request's barrier workspace: a small version of csrc/cuda/launch/barrier_workspace.cpp.
simt::Buffer& barrier_workspace_of(const Request& request) {
  static std::map<std::string, std::unique_ptr<simt::Buffer>> all;
  const auto named = request.options.find("workspace");
  const std::string name = named == request.options.end() ? "" : "." + named->second;
  std::unique_ptr<simt::Buffer>& buffer = all[name];
  constexpr size_t kBytes = size_t{bnk::kBarrierWords} * bnk::kBarrierWordBytes;
  if (name.empty() || !buffer) {
    buffer = std::make_unique<simt::Buffer>("barrier_words" + name, kBytes);
    std::fill_n(buffer->host<char>(), kBytes, char{0});
  }
  return *buffer;
}

// Empty if every barrier word is in its state between launches (BarrierWord in csrc/cuda/device/persistent.cuh).
std::string not_at_rest(const simt::Buffer& workspace) {
  const auto* words = workspace.host<bnk::BarrierWord>();
  for (int i = 0; i < bnk::kBarrierWords; ++i) {
    const unsigned value = words[i].value;
    if ((i == 0 ? value : value << 1) != 0) {
      return "barrier word " + std::to_string(i) + " is left at " + std::to_string(value);
    }
  }
  return "";
}

void print_plan(const bnk::Plan& plan) {
  const bool persistent = plan.path == bnk::Path::kPersistent;
  static const char* const layouts[] = {"channels_first", "channels_last", "packed"};
  static const char* const reasons[] = {"none", "forced", "no_reduction", "no_cooperation", "does_not_fit"};
  static const char* const groups[] = {"cta", "cluster", "grid"};
  const bnk::TilePartition& partition = persistent ? plan.persistent.partition : plan.two_pass.partition;
  const bnk::Launch& launch = persistent ? plan.persistent.launch : plan.two_pass.tile_launch;
  std::cout << "plan path=" << (persistent ? "persistent" : "two_pass")
            << " reason=" << reasons[static_cast<int>(plan.reason)]
            << " layout=" << layouts[static_cast<int>(partition.layout)] << " grid=" << launch.grid
            << " block=" << launch.block << " channel_tiles=" << partition.channel_tiles.value
            << " tile_channels=" << partition.tile_channels
            << " group_size=" << (persistent ? plan.persistent.group_size : 0)
            << " group=" << (persistent ? groups[static_cast<int>(plan.persistent.group)] : "none")
            << " groups=" << (persistent ? plan.persistent.groups : 0)
            << " cached_vectors=" << (persistent ? plan.persistent.cached_vectors : 0)
            << " two_shot=" << (persistent && plan.persistent.two_shot) << " floor_read=" << plan.floor.read
            << " floor_written=" << plan.floor.written << " read=" << plan.predicted.read
            << " written=" << plan.predicted.written << " exchanged_read=" << plan.exchanged.read
            << " exchanged_written=" << plan.exchanged.written << '\n';
}

void answer(Request& request) {
  if (const auto plan = plan_for_device(request)) {
    print_plan(*plan);
    if (request.integer("only_plan", 0) != 0) {
      std::cout << "done" << std::endl;
      return;
    }
  }
  const bnk::TwoPassPlan plan = two_pass_plan(request);
  const std::optional<bnk::PersistentPlan> persistent = persistent_plan(request);
  const size_t scratch_bytes = static_cast<size_t>(scratch_doubles(request, plan, persistent)) * sizeof(double);
  const bool huge = scratch_bytes >> 30 != 0;
  simt::Buffer scratch("scratch", scratch_bytes, 0,
                       huge ? simt::Buffer::Storage::kSparse : simt::Buffer::Storage::kDense);
  // Every run starts with the barrier words as the previous run left them.
  simt::Buffer& workspace = barrier_workspace_of(request);
  const auto first_seed = static_cast<uint64_t>(request.integer("first_seed", 0));
  const auto seeds = static_cast<uint64_t>(request.integer("seeds", 1));
  std::vector<std::vector<char>> first;
  std::unique_ptr<HostExecutor> first_executor;
  for (uint64_t seed = first_seed; seed < first_seed + seeds; ++seed) {
    for (Tensor& tensor : request.tensors) tensor.reset();
    auto executor = std::make_unique<HostExecutor>(request, seed);
    run_sequence(request, plan, persistent, scratch, workspace, *executor);
    if (executor->fault.empty()) executor->fault = not_at_rest(workspace);
    if (!executor->fault.empty()) {
      for (char& c : executor->fault) c = c == '\n' ? '|' : c;
      std::cout << "fault " << seed << ' ' << executor->count - 1 << ' ' << executor->fault << std::endl;
      return;
    }
    if (first_executor) {
      const std::string what = difference(request, first, *first_executor, *executor);
      if (what.empty()) continue;
      std::cout << "differs " << seed << ' ' << what << std::endl;
      return;
    }
    for (const Tensor& tensor : request.tensors) {
      first.emplace_back(tensor.content(), tensor.content() + tensor.sent);
    }
    first_executor = std::move(executor);
  }
  for (const std::string& line : first_executor->lines) std::cout << line << '\n';
  std::cout << "done\n";
  for (size_t i = 0; i < request.tensors.size(); ++i) {
    if (request.tensors[i].mode == "in") continue;
    std::cout.write(first[i].data(), static_cast<std::streamsize>(first[i].size()));
  }
  std::cout.flush();
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  for (;;) {
    Request request;
    if (!simt::read_request(std::cin, request)) return 0;
    answer(request);
  }
}
