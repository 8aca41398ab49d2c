// The Python module bnkernels._C: the ops by a direct call, and what this build was made with.
//
// A call from here is cheaper than one through torch.ops, which matches its arguments against a schema; both end in the
// same ops.
#include <ATen/core/LegacyTypeDispatch.h>
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

// What this library was built with, to be found in the file itself: a library that does not load cannot be asked. Volatile,
// so that a compiler does not copy the text in pieces and leave the whole out.
const char* const volatile kBuildTag = "bnkernels-build torch=" BNK_BUILD_TORCH " cuda=" BNK_BUILD_CUDA;

// Gradients are the business of the caller, bnkernels/autograd.py: the ops have none of their own to record.
using BelowAutograd = at::AutoDispatchBelowADInplaceOrView;

ThreeTensors forward_train(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps) {
  const py::gil_scoped_release release;
  const BelowAutograd guard;
  return batch_norm_train(x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps);
}

ThreeTensors forward_eval(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                          const at::Tensor& running_mean, const at::Tensor& running_var, double eps) {
  const py::gil_scoped_release release;
  const BelowAutograd guard;
  return batch_norm_eval(x, weight, bias, running_mean, running_var, eps);
}

using Gradients = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor>;

// None for those that were not asked for.
Gradients needed_of(ThreeTensors grads, bool need_input, bool need_weight, bool need_bias) {
  const auto if_needed = [](bool needed, at::Tensor& tensor) {
    return needed ? OptionalTensor(std::move(tensor)) : std::nullopt;
  };
  auto& [grad_x, grad_weight, grad_bias] = grads;
  return {if_needed(need_input, grad_x), if_needed(need_weight, grad_weight), if_needed(need_bias, grad_bias)};
}

Gradients backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight, const at::Tensor& mean,
                   const at::Tensor& invstd, bool training, bool need_input, bool need_weight, bool need_bias) {
  const py::gil_scoped_release release;
  const BelowAutograd guard;
  return needed_of(batch_norm_backward(grad, x, weight, mean, invstd, training, need_input, need_weight, need_bias),
                   need_input, need_weight && weight.has_value(), need_bias);
}

FourTensors fused_forward_train(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                                const OptionalTensor& bias, const OptionalTensor& running_mean,
                                const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                                std::optional<double> momentum, double eps, bool relu) {
  const py::gil_scoped_release release;
  const BelowAutograd guard;
  return batch_norm_fused_train(x, residual, weight, bias, running_mean, running_var, num_batches_tracked, momentum,
                                eps, relu);
}

FourTensors fused_forward_eval(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                               const OptionalTensor& bias, const at::Tensor& running_mean,
                               const at::Tensor& running_var, double eps, bool relu) {
  const py::gil_scoped_release release;
  const BelowAutograd guard;
  return batch_norm_fused_eval(x, residual, weight, bias, running_mean, running_var, eps, relu);
}

Gradients relu_backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight,
                        const at::Tensor& mean, const at::Tensor& invstd, const at::Tensor& relu_bounds, bool training,
                        bool need_input, bool need_weight, bool need_bias) {
  const py::gil_scoped_release release;
  const BelowAutograd guard;
  return needed_of(batch_norm_relu_backward(grad, x, weight, mean, invstd, relu_bounds, training, need_input,
                                            need_weight, need_bias),
                   need_input, need_weight && weight.has_value(), need_bias);
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
  module.doc() = "The compiled part of bnkernels; bnkernels/ops.py is its only user.";
  using py::arg;
  module.def("forward_train", &bnk::forward_train, arg("x"), arg("weight"), arg("bias"), arg("running_mean"),
             arg("running_var"), arg("num_batches_tracked"), arg("momentum"), arg("eps"));
  module.def("forward_eval", &bnk::forward_eval, arg("x"), arg("weight"), arg("bias"), arg("running_mean"),
             arg("running_var"), arg("eps"));
  module.def("backward", &bnk::backward, arg("grad"), arg("x"), arg("weight"), arg("mean"), arg("invstd"),
             arg("training"), arg("need_input"), arg("need_weight"), arg("need_bias"));
  module.def("fused_forward_train", &bnk::fused_forward_train, arg("x"), arg("residual"), arg("weight"), arg("bias"),
             arg("running_mean"), arg("running_var"), arg("num_batches_tracked"), arg("momentum"), arg("eps"),
             arg("relu"));
  module.def("fused_forward_eval", &bnk::fused_forward_eval, arg("x"), arg("residual"), arg("weight"), arg("bias"),
             arg("running_mean"), arg("running_var"), arg("eps"), arg("relu"));
  module.def("relu_backward", &bnk::relu_backward, arg("grad"), arg("x"), arg("weight"), arg("mean"), arg("invstd"),
             arg("relu_bounds"), arg("training"), arg("need_input"), arg("need_weight"), arg("need_bias"));
  module.def("empty_cache", &bnk::empty_cache);
  module.def("build_info", &bnk::build_info);
  module.def("barrier_workspace", &bnk::barrier_workspace, arg("device"));
  bnk::bind_plan(module);
}
