// The Python module bnkernels._C: direct calls of the ops, and build information.
//
// A call through this module is cheaper than one through torch.ops, which matches its arguments against a schema. Both
// call the same registered ops.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "../cpu/backend.h"
#include "../cpu/result_cache.h"
#include "bindings_plan.h"
#include "dispatch.h"
#include "ops.h"

#ifndef BNK_WITH_CUDA
#define BNK_BUILD_CUDA "none"
#endif

namespace py = pybind11;

namespace bnk {
namespace {

// The build information as text that can be found in the file, for a library that fails to load. Volatile, so that the
// compiler does not split the text into pieces and drop the whole.
const char* const volatile kBuildTag = "bnkernels-build torch=" BNK_BUILD_TORCH " cuda=" BNK_BUILD_CUDA;

// Calls a registered op through the dispatcher, but below autograd: the ops record no gradients (see
// bnkernels/autograd).
template <typename Signature>
class Op;
template <typename Result, typename... Args>
class Op<Result(Args...)> {
 public:
  explicit Op(const char* name)
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Result(Args...)>()) {}

  Result operator()(Args... args) const {
    const py::gil_scoped_release release;
    const at::AutoDispatchBelowADInplaceOrView guard;
    return handle_.call(args...);
  }

 private:
  c10::TypedOperatorHandle<Result(Args...)> handle_;
};

// Wraps a forward op for Python: relu_bounds of size 0 become None.
template <typename... Args>
auto forward(FourTensors (&)(Args...), const char* name) {
  return [op = Op<FourTensors(Args...)>(name)](Args... args) {
    auto [y, mean, invstd, relu_bounds] = op(args...);
    return std::tuple(y, mean, invstd, relu_bounds.numel() == 0 ? OptionalTensor() : OptionalTensor(relu_bounds));
  };
}

using Gradients = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor>;

// Returns None for gradients that were not requested.
Gradients backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight, const at::Tensor& mean,
                   const at::Tensor& invstd, bool training, bool need_input, bool need_weight, bool need_bias,
                   const OptionalTensor& relu_bounds) {
  static const Op<decltype(batch_norm_backward)> op("bnkernels::batch_norm_backward");
  auto [grad_x, grad_weight, grad_bias] =
      op(grad, x, weight, mean, invstd, training, need_input, need_weight, need_bias, relu_bounds);
  const auto if_needed = [](bool needed, at::Tensor& tensor) {
    return needed ? OptionalTensor(std::move(tensor)) : std::nullopt;
  };
  return {if_needed(need_input, grad_x), if_needed(need_weight && weight.has_value(), grad_weight),
          if_needed(need_bias, grad_bias)};
}

size_t empty_cache() {
  const py::gil_scoped_release release;
  return cpu::empty_result_cache();
}

py::dict build_info() {
  py::dict info;
  info["tag"] = static_cast<const char*>(kBuildTag);
  info["torch"] = BNK_BUILD_TORCH;
#ifdef BNK_WITH_CUDA
  info["with_cuda"] = true;
  info["cuda"] = BNK_BUILD_CUDA;
  info["arch_list"] = BNK_BUILD_ARCHS;
#else
  info["with_cuda"] = false;
  info["cuda"] = py::none();
  info["arch_list"] = py::none();
#endif
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["simd"] = cpu::simd_level();
  return info;
}

}  // namespace
}  // namespace bnk

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "The compiled part of bnkernels; bnkernels/_ops is its only user.";
  using py::arg;
  module.def("forward_train", bnk::forward(bnk::batch_norm_train, "bnkernels::batch_norm_train"), arg("x"),
             arg("weight"), arg("bias"), arg("running_mean"), arg("running_var"), arg("num_batches_tracked"),
             arg("momentum"), arg("eps"), arg("residual") = py::none(), arg("relu") = false);
  module.def("forward_eval", bnk::forward(bnk::batch_norm_eval, "bnkernels::batch_norm_eval"), arg("x"), arg("weight"),
             arg("bias"), arg("running_mean"), arg("running_var"), arg("eps"), arg("residual") = py::none(),
             arg("relu") = false);
  module.def("backward", &bnk::backward, arg("grad"), arg("x"), arg("weight"), arg("mean"), arg("invstd"),
             arg("training"), arg("need_input"), arg("need_weight"), arg("need_bias"), arg("relu_bounds") = py::none());
  module.def("empty_cache", &bnk::empty_cache);
  module.def("build_info", &bnk::build_info);
  module.def("barrier_workspace", &bnk::barrier_workspace, arg("device"));
  bnk::bind_plan(module);
}
