#include "fake_cuda/kernels.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <typeinfo>

#include "cuda/launch/persistent.h"
#include "cuda/launch/sync.h"
#include "cuda/launch/two_pass.h"
#include "fake_cuda/memory.h"
#include "fake_cuda/state.h"
#include "simt/engine.h"

namespace fake_cuda {
namespace {

// By symbol. Kernels that are not templates are static, and nvcc mangles a static function differently in each file;
// their key is the type of their argument.
using Kernels = std::map<std::string, Kernel>;

std::string demangled(const std::string& name) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status),
                                                    std::free);
  return status == 0 ? text.get() : name;
}

// The text in the last parentheses of a function's demangled name: the type of a kernel's one argument.
std::string argument_of(const std::string& mangled) {
  const std::string name = demangled(mangled);
  const size_t open = name.rfind('('), close = name.rfind(')');
  return open == std::string::npos || close < open ? "" : name.substr(open + 1, close - open - 1);
}

// An executor that launches nothing, but records the kernels of the launch sequences.
class Collector {
 public:
  explicit Collector(Kernels* kernels) : kernels_(kernels) {}

  template <typename Plan, typename Params>
  void launch(const Plan&, void (*kernel)(Params), const Params&) {
    Dl_info info{};
    const bool named = dladdr(reinterpret_cast<void*>(kernel), &info) != 0 && info.dli_sname != nullptr;
    const std::string key = named ? info.dli_sname : demangled(typeid(Params).name());
    (*kernels_)[key] = {[](void* function, const void* argument) {
                          reinterpret_cast<void (*)(Params)>(function)(*static_cast<const Params*>(argument));
                        },
                        reinterpret_cast<void*>(kernel), sizeof(Params)};
  }

 private:
  Kernels* kernels_;
};

// Records all kernels that the sequences launch for a dtype. The kernel also depends on the layout, on the epilogue or
// its ReLU backward, and on which gradients the backward returns. The two-pass path takes the layout from the problem
// (inner == 1 is channels-last), the persistent kernel from its plan.
void collect(bnk::Dtype dtype, Collector& collector) {
  char something = 0;
  for (const bool has_epilogue : {false, true}) {
    bnk::ForwardTrainArgs forward{};
    bnk::ForwardEvalArgs eval{};
    bnk::BackwardArgs backward{};
    forward.epilogue.relu = eval.epilogue.relu = has_epilogue;
    backward.training = true;
    backward.grad_x = &something;
    if (has_epilogue) backward.relu_low.data = &something;
    forward.problem.dtype = eval.problem.dtype = backward.problem.dtype = dtype;
    for (const bnk::Layout layout : {bnk::Layout::kChannelsFirst, bnk::Layout::kChannelsLast, bnk::Layout::kPacked}) {
      bnk::PersistentPlan plan{};
      plan.partition.layout = layout;
      bnk::persistent::forward_train(forward, plan, nullptr, nullptr, collector);
      bnk::persistent::backward(backward, plan, nullptr, nullptr, collector);
    }
    for (const int64_t inner : {1, 2}) {
      forward.problem.inner = eval.problem.inner = backward.problem.inner = inner;
      bnk::two_pass::forward_train(forward, {}, nullptr, collector);
      bnk::two_pass::forward_eval(eval, {}, collector);
      bnk::two_pass::backward(backward, {}, nullptr, collector);
    }
  }
  for (const int64_t inner : {1, 2}) {
    const bnk::Problem problem{0, 0, inner, dtype};
    bnk::StatisticsArgs statistics{};
    bnk::NormalizeArgs normalize{};
    bnk::GradSumsArgs grad_sums{};
    bnk::GradInputArgs grad_input{};
    statistics.problem = normalize.problem = grad_sums.problem = grad_input.problem = problem;
    bnk::sync::statistics(statistics, {}, nullptr, collector);
    bnk::sync::normalize(normalize, {}, collector);
    bnk::sync::grad_sums(grad_sums, {}, nullptr, collector);
    bnk::sync::grad_input(grad_input, {}, {}, nullptr, collector);
  }
}

Kernels collect() {
  Kernels kernels;
  Collector collector(&kernels);
  for (const bnk::Dtype dtype :
       {bnk::Dtype::kFloat64, bnk::Dtype::kFloat32, bnk::Dtype::kFloat16, bnk::Dtype::kBFloat16}) {
    collect(dtype, collector);
  }
  bnk::sync::combine_statistics({}, {}, collector);
  return kernels;
}

}  // namespace

const Kernel* find_kernel(const std::string& mangled) {
  static const Kernels& all = *new Kernels(collect());
  auto found = all.find(mangled);
  if (found == all.end()) found = all.find(argument_of(mangled));
  return found == all.end() ? nullptr : &found->second;
}

void run_kernel(const std::string& name, const Kernel& kernel, const Geometry& geometry, int device,
                const void* argument) {
  static uint64_t seed = 0;  // a different order of the threads in each launch
  enter_kernel(device);
  // Blocks that need not be co-resident run in groups of a few, which keeps the engine's launches small.
  constexpr unsigned kBeside = simt::kMaxCluster;
  const unsigned blocks = geometry.together ? geometry.grid : kBeside / geometry.cluster * geometry.cluster;
  for (unsigned first = 0; first < geometry.grid && !has_faulted(); first += blocks) {
    const simt::Report report = simt::launch({.grid = std::min(blocks, geometry.grid - first),
                                              .block = geometry.block,
                                              .cluster = geometry.cluster,
                                              .seed = seed++,
                                              .dynamic_bytes = geometry.dynamic_bytes,
                                              .first_block = first,
                                              .of_blocks = geometry.grid},
                                             [&] { kernel.call(kernel.kernel, argument); });
    if (!report.ok()) fault(name + ": " + report.fault);
  }
}

}  // namespace fake_cuda
