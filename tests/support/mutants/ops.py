"""Faults of the C++ ops: argument checks, shapes and dtypes of results, mutated arguments, schemas."""

from __future__ import annotations

from . import Build, Mutant

ARGUMENTS = ("tests/api/test_ops.py", "-k", "not opcheck and not fakes")
REGISTRATION = ("tests/api/test_ops.py", "-k", "fakes or opcheck_of_training or (opcheck and (weight or 3-D))")
SYNC_OPS = ("tests/distributed/test_sync_ops.py", "-k", "not opcheck and not fakes and not many and not adversarial")
FUNCTION = ("tests/api/test_functional.py", "-k", "optional or missing or dtypes or strided or eps or empty")
MODULES = ("tests/api/test_modules.py",)
FUSED = ("tests/api/test_fused.py", "-k", "not test_values and not compiled and not opcheck")
FUSED_OPCHECK = ("tests/api/test_fused.py", "-k", "opcheck")
MEMORY = ("tests/cpu/test_cpu_memory.py", "-k", "filled")
PROFILER = ("tests/api/test_tools.py", "-k", "memory_profiler")
LAYOUT_TAGS = ("tests/compile/test_compile.py", "-k", "flexible_layout")
OTHER_DEVICE = ("tests/api/test_ops.py", "-k", "another_device")


def _mutant(
    fault: str, file: str, old: str, new: str, tests: tuple[str, ...], build: Build = Build.EXTENSION
) -> Mutant:
    return Mutant(fault, f"csrc/{file}", old, new, tests, build)


MUTANTS: list[Mutant] = [
    # arguments.cpp
    _mutant(
        "checks: float64 inputs accept float32 parameters",
        "torch/arguments.cpp",
        "  const bool sixteen_bit = size_of(to_dtype(data)) == 2;",
        "  const bool sixteen_bit = size_of(to_dtype(data)) != 4;",
        ARGUMENTS,
    ),
    _mutant(
        "autograd is not notified of a strided vector's change",
        "torch/arguments.cpp",
        "    given_.copy_(dense_);\n  }\n  mark_changed(given_);\n",
        "    given_.copy_(dense_);\n    return;\n  }\n  mark_changed(given_);\n",
        ARGUMENTS,
    ),
    _mutant(
        "autograd is not notified that an empty batch was counted",
        "torch/arguments.cpp",
        "    counter.add_(1);\n  }\n  mark_changed(counter);\n",
        "    counter.add_(1);\n  }\n",
        ARGUMENTS,
    ),
    _mutant(
        "checks: running statistics may overlap the weight",
        "torch/arguments.cpp",
        "  if (defined() && read.defined()) at::assert_no_overlap(given_, read);\n",
        "",
        ARGUMENTS,
    ),
    _mutant(
        "checks: strided running statistics may interleave",
        "torch/arguments.cpp",
        "                  !share_an_element(given_, other.given_),",
        "                  true,",
        ARGUMENTS,
    ),
    _mutant(
        "checks: overlapping running statistics are accepted",
        "torch/arguments.h",
        "  running_mean.check_writable(running_var);\n  running_var.check_writable(running_mean);\n",
        "",
        ARGUMENTS,
    ),
    _mutant(
        "checks: the running statistics are checked separately, not against each other",
        "torch/arguments.cpp",
        "  at::assert_no_overlap(given_, other.given_);\n",
        "  (void)other;",
        ARGUMENTS,
    ),
    _mutant(
        "checks: a vector on another device is accepted",
        "torch/arguments.cpp",
        '  TORCH_CHECK(given->device() == device, "batch_norm: expected ", name, " on the input\'s device, ", device,\n'
        '              ", but got it on ", given->device());\n'
        "  const at::ScalarType type",
        "  (void)device;\n  const at::ScalarType type",
        OTHER_DEVICE,
        Build.FAKE_CUDA,
    ),
    _mutant(
        "checks: only the number of elements of a gradient or residual is checked, not its shape",
        "torch/arguments.cpp",
        "  TORCH_CHECK(tensor.sizes() == x.sizes(), who",
        "  TORCH_CHECK(tensor.numel() == x.numel(), who",
        ARGUMENTS,
    ),
    _mutant(
        "checks: a counter of several elements is accepted",
        "torch/arguments.cpp",
        "counter->scalar_type() == at::kLong && counter->numel() == 1",
        "counter->scalar_type() == at::kLong",
        ARGUMENTS,
    ),
    _mutant(
        "checks: a 16-bit input accepts saved statistics of 16 bits",
        "torch/arguments.cpp",
        "  TORCH_CHECK(given.scalar_type() == expected, ",
        "  TORCH_CHECK(given.scalar_type() == expected || given.scalar_type() == input.tensor.scalar_type(), ",
        ARGUMENTS,
    ),
    _mutant(
        "checks: the dtype of relu_bounds is not checked",
        "torch/arguments.cpp",
        "                  given.scalar_type() == expected && given.device() == input.tensor.device(),",
        "                  given.device() == input.tensor.device(),",
        FUSED,
    ),
    _mutant(
        "checks: rows of zero ranks are accepted",
        "torch/arguments.cpp",
        "given.dim() == 2 && given.size(0) >= 1 && given.size(1) == row",
        "given.dim() == 2 && given.size(1) == row",
        SYNC_OPS,
    ),
    _mutant(
        "strided running statistics: the updated copy is not written back",
        "torch/arguments.cpp",
        "    given_.copy_(dense_);\n",
        "",
        FUNCTION,
    ),
    _mutant(
        "running statistics: autograd is not notified of the change",
        "torch/arguments.cpp",
        "    given_.copy_(dense_);\n  }\n  mark_changed(given_);\n",
        "    given_.copy_(dense_);\n  }\n",
        ARGUMENTS,
    ),
    _mutant(
        "a channels_last input is described as contiguous",
        "torch/arguments.cpp",
        "    input.problem = {batch * spatial, channels, 1, dtype};",
        "    input.problem = {batch, channels, spatial, dtype};",
        FUSED,
    ),
    # ops.cpp: training, inference, backward
    _mutant(
        "training: momentum None is momentum 0.0",
        "torch/ops.cpp",
        "          .cumulative = !momentum.has_value() && averages,",
        "          .cumulative = false,",
        MODULES,
    ),
    _mutant(
        "training: a call with one value per channel is rejected after the batch was counted",
        "torch/ops.cpp",
        "  TORCH_CHECK_VALUE(input.problem.elements_per_channel() != 1,",
        "  if (counts && input.problem.elements_per_channel() == 1) num_batches_tracked->add_(1);\n"
        "  TORCH_CHECK_VALUE(input.problem.elements_per_channel() != 1,",
        ARGUMENTS,
    ),
    _mutant(
        "training: an empty batch is not counted",
        "torch/ops.cpp",
        "    if (counts) count_batch(*num_batches_tracked);\n",
        "",
        MODULES,
    ),
    _mutant(
        "training: autograd is not notified of the counter's change",
        "torch/ops.cpp",
        "  if (counts) mark_changed(*num_batches_tracked);\n",
        "",
        ARGUMENTS,
    ),
    _mutant(
        "training: one running statistic without the other is accepted",
        "torch/ops.cpp",
        "  TORCH_CHECK_VALUE(averages == average_var.defined(),\n",
        "  TORCH_CHECK_VALUE(!averages || average_var.defined(),\n",
        ARGUMENTS,
    ),
    _mutant(
        "inference: eps 0 is rejected, as in training",
        "torch/ops.cpp",
        "  TORCH_CHECK_VALUE(eps >= 0, ",
        "  TORCH_CHECK_VALUE(eps > 0, ",
        FUNCTION,
    ),
    _mutant(
        "inference: running statistics of different dtypes are accepted",
        "torch/ops.cpp",
        '  check_same_dtype(average_mean, "running_mean", average_var, "running_var");\n',
        "",
        ARGUMENTS,
    ),
    _mutant(
        "epilogue: relu_bounds is also returned with a residual",
        "torch/ops.cpp",
        "    if (relu && !adds) {\n",
        "    if (relu) {\n",
        FUSED_OPCHECK,
    ),
    _mutant(
        "backward: a weight gradient is returned without a weight",
        "torch/ops.cpp",
        "parameter_grad(need_weight && scale.defined());",
        "parameter_grad(need_weight);",
        REGISTRATION,
    ),
    _mutant(
        "backward: the gradients of weight and bias are swapped",
        "torch/ops.cpp",
        "      input.tensor);\n  return {grad_x, grad_weight, grad_bias};",
        "      input.tensor);\n  return {grad_x, grad_bias, grad_weight};",
        FUNCTION,
    ),
    _mutant(
        "backward: the parameters' gradients have the input's dtype",
        "torch/ops.cpp",
        "  const Dtype parameter_dtype = scale.defined() ? scale.pointer().dtype"
        " : accumulate_dtype(input.problem.dtype);\n",
        "  const Dtype parameter_dtype = scale.defined() ? input.problem.dtype"
        " : accumulate_dtype(input.problem.dtype);\n",
        FUNCTION,
    ),
    # ops.cpp: schemas and functional ops
    _mutant(
        "schema: running_var is not marked as mutated",
        "torch/ops.cpp",
        'Tensor(a!)? running_mean, Tensor(b!)? running_var, "',
        'Tensor(a!)? running_mean, Tensor? running_var, "',
        REGISTRATION,
    ),
    _mutant(
        "functional op: the new running statistics are swapped",
        "torch/ops.cpp",
        "  return {y, mean, invstd, relu_bounds, new_mean, new_var, new_count};",
        "  return {y, mean, invstd, relu_bounds, new_var, new_mean, new_count};",
        ARGUMENTS,
    ),
    _mutant(
        "functional ops: the given buffers are changed",
        "torch/ops_results.h",
        "    return tensor->clone();",
        "    return tensor;",
        ARGUMENTS,
    ),
    _mutant(
        "ops: not tagged as accepting any layout",
        "torch/ops_results.h",
        "{at::Tag::pt2_compliant_tag, at::Tag::flexible_layout}",
        "{at::Tag::pt2_compliant_tag}",
        LAYOUT_TAGS,
    ),
    _mutant(
        "functional op with an epilogue: the given counter is incremented instead of its copy",
        "torch/ops.cpp",
        "buffers.num_batches_tracked, momentum, eps, residual, relu);",
        "num_batches_tracked, momentum, eps, residual, relu);",
        FUSED_OPCHECK,
    ),
    # ops_sync.cpp
    _mutant(
        "sync combine: the batch is counted before eps is checked",
        "torch/ops_sync.cpp",
        '  TORCH_CHECK_VALUE(eps > 0, "batch_norm eps must be positive during training, but got ", eps);\n'
        "\n"
        "  const Dtype statistic",
        "  if (counts) count_batch(*num_batches_tracked);\n"
        '  TORCH_CHECK_VALUE(eps > 0, "batch_norm eps must be positive during training, but got ", eps);\n'
        "  if (counts) num_batches_tracked->sub_(1);\n"
        "  const Dtype statistic",
        SYNC_OPS,
    ),
    _mutant(
        "sync combine: the batch is not counted",
        "torch/ops_sync.cpp",
        "  if (counts) count_batch(*num_batches_tracked);\n",
        "",
        SYNC_OPS,
    ),
    _mutant(
        "sync combine: momentum None is momentum 0.0",
        "torch/ops_sync.cpp",
        "          .cumulative = !momentum.has_value() && averages,",
        "          .cumulative = false,",
        SYNC_OPS,
    ),
    _mutant(
        "sync combine: statistics of float64 inputs are float32",
        "torch/ops_sync.cpp",
        "  const Dtype statistic = accumulate_dtype(to_dtype(dtype));",
        "  const Dtype statistic = Dtype::kFloat32;",
        SYNC_OPS,
    ),
    _mutant(
        "sync normalize: weight and bias of different dtypes are accepted",
        "torch/ops_sync.cpp",
        '  check_same_dtype(scale, "weight", shift, "bias");\n',
        "",
        SYNC_OPS,
    ),
    _mutant(
        "sync backward: a count of several elements is accepted",
        "torch/ops_sync.cpp",
        "  TORCH_CHECK(count.numel() == 1 && count.scalar_type()",
        "  TORCH_CHECK(count.scalar_type()",
        SYNC_OPS,
    ),
    # result_memory.cpp
    _mutant(
        "results: torch's deterministic filling of fresh memory is skipped",
        "torch/result_memory.cpp",
        "  if (!x.is_cpu() || fills_fresh_memory()) return at::empty_like",
        "  if (!x.is_cpu()) return at::empty_like",
        MEMORY,
    ),
    _mutant(
        "results: torch's memory profiler does not see freed memory",
        "torch/result_memory.cpp",
        "  c10::profiledCPUMemoryReporter().Delete(block->data);\n",
        "",
        PROFILER,
    ),
]
