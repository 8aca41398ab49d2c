"""Faults in the Python code of derivatives, fakes, the reference, the tolerance and explain()."""

from __future__ import annotations

from . import Mutant
from .package import FUSED, SYNC, mutant

REGISTRATION = ("tests/api/test_ops.py", "-k", "fakes or opcheck_of_training or (opcheck and (weight or 3-D))")
AUTOGRAD = ("tests/autograd/test_autograd.py",)
FUNC = ("tests/autograd/test_func.py",)
COMPILE = ("tests/compile/test_compile.py", "-k", "layers or transform")
FUSED_OPCHECK = ("tests/api/test_fused.py", "-k", "opcheck")
FAKES = ("tests/compile/test_fakes.py",)
REFERENCE = ("tests/numerics/test_reference.py",)
TOLERANCE = ("tests/numerics/test_tolerance.py",)
EXPLAIN = ("tests/plan/test_explain.py", "tests/plan/test_explain_model.py")


MUTANTS: list[Mutant] = [
    mutant(
        "autograd: every gradient is computed even if not needed",
        "autograd/functions.py",
        "        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]\n        create_graph",
        "        need_input, need_weight, need_bias = True, weight is not None, True\n        create_graph",
        AUTOGRAD,
    ),
    mutant(
        "autograd: the backward of inference reads the current running mean instead of the forward's",
        "autograd/functions.py",
        "        ctx.save_for_backward(x, weight, mean, invstd)\n",
        "        ctx.save_for_backward(x, weight, mean if training else running_mean, invstd)\n",
        AUTOGRAD,
    ),
    mutant(
        "autograd: forward mode outside of torch.func is ignored",
        "autograd/functions.py",
        "    if transformed:\n        outputs:",
        "    if transforms_active():\n        outputs:",
        AUTOGRAD,
    ),
    mutant(
        "autograd: tangents of a gradient are lost where the forward was outside of the dual level",
        "autograd/functions.py",
        "        create_graph = is_grad_enabled() or transforms_active() or forward_ad._current_level >= 0\n",
        "        create_graph = is_grad_enabled() or transforms_active()\n",
        AUTOGRAD,
    ),
    mutant(
        "autograd: the first gradient is not differentiable",
        "autograd/functions.py",
        "        create_graph = is_grad_enabled() or transforms_active() or forward_ad._current_level >= 0\n",
        "        create_graph = transforms_active() or forward_ad._current_level >= 0\n",
        AUTOGRAD,
    ),
    mutant(
        "autograd: a running_var that requires a gradient is accepted",
        "autograd/functions.py",
        "        or (running_var is not None and running_var.requires_grad)\n",
        "",
        AUTOGRAD,
    ),
    mutant(
        "autograd: a bias gets no gradient if nothing else requires one",
        "autograd/functions.py",
        "        or (bias is not None and bias.requires_grad)\n",
        "",
        AUTOGRAD,
    ),
    mutant(
        "autograd: a compiler that traces a transform of torch.func gets a Function",
        "autograd/functions.py",
        "            return formulas.forward(x, weight, bias, *spec)\n        return _traced",
        "            return _traced(x, weight, bias, spec, residual, relu)\n        return _traced",
        COMPILE,
    ),
    mutant(
        "autograd, compiled: the new count is not written back",
        "autograd/functions.py",
        "    for buffer, updated in zip(spec[:3], outputs[4:]):\n",
        "    for buffer, updated in zip(spec[:2], outputs[4:]):\n",
        COMPILE,
    ),
    mutant(
        "double backward: the sign of the input's second term",
        "autograd/formulas.py",
        "            input_terms.append(-s.scale(weight) * s.invstd * bracket)\n",
        "            input_terms.append(s.scale(weight) * s.invstd * bracket)\n",
        AUTOGRAD,
    ),
    mutant(
        "double backward: the weight's term lacks invstd",
        "autograd/formulas.py",
        "            grad_weight = s.sum(projected_u * g * s.invstd)\n",
        "            grad_weight = s.sum(projected_u * g)\n",
        AUTOGRAD,
    ),
    mutant(
        "double backward: the cotangent of the weight's gradient is assumed equal on all ranks",
        "autograd/formulas.py",
        "            input_terms.append(s.invstd * s.project(a * g))  # a may differ between ranks\n",
        "            input_terms.append(a * s.invstd * s.project(g))\n",
        SYNC,
    ),
    mutant(
        "double backward over ranks: the means of the ranks are averaged without weights",
        "autograd/formulas.py",
        "        return self.broadcast(self.total(self.sum(v)) / self.count.to(self.dtype))\n",
        "        ranks = self.total(torch.ones_like(self.count)).to(self.dtype)\n"
        "        return self.broadcast(self.total(v.mean(self.reduced_dims)) / ranks)\n",
        SYNC,
    ),
    mutant(
        "forward over reverse: a sign in the tangent of the projection",
        "autograd/formulas.py",
        "            dproject = -dxhat * s.mean(s.xhat * g) - s.xhat * s.mean(dxhat * g)  # (dP) g\n",
        "            dproject = -dxhat * s.mean(s.xhat * g) + s.xhat * s.mean(dxhat * g)  # (dP) g\n",
        FUNC,
    ),
    mutant(
        "plain formula: the running variance is the biased one",
        "autograd/formulas.py",
        "(running_var, s.batch_var * (n / (n - 1)))",
        "(running_var, s.batch_var)",
        FUNC,
    ),
    mutant(
        "double backward of a ReLU: gradients outside the bounds are not masked",
        "autograd/formulas.py",
        "    return grad.masked_fill((value < low) | (value > high), 0)\n",
        "    return grad.masked_fill((value < low) & (value > high), 0)\n",
        FUSED,
    ),
    mutant(
        "vmap: the bias is folded along the weight's batch dimension",
        "autograd/batching.py",
        "        _fold_vector(bias, bias_dim, batch),\n        fresh_mean,\n",
        "        _fold_vector(bias, weight_dim, batch),\n        fresh_mean,\n",
        FUNC,
    ),
    mutant(
        "vmap: batches are not counted",
        "autograd/batching.py",
        "        num_batches_tracked.add_(1)\n",
        "        pass\n",
        FUNC,
    ),
    mutant(
        "vmap: each model's averaging factor is broadcast along channels",
        "autograd/batching.py",
        "        if isinstance(factor, Tensor) and factor_dim is not None:\n            factor = factor.view(-1, 1)\n",
        "",
        FUNC,
    ),
    mutant(
        "vmap: examples that normalise the same input may not share buffers",
        "autograd/batching.py",
        "    if x_dim is not None and any(",
        "    if any(",
        FUNC,
    ),
    mutant(
        "epilogue: a residual gets no gradient if nothing else requires one",
        "autograd/functions.py",
        "        or (residual is not None and residual.requires_grad)\n",
        "",
        FUSED,
    ),
    mutant(
        "epilogue: inference uses the backward of training",
        "autograd/functions.py",
        "        ctx.call = (training, eps, relu, residual is not None)\n",
        "        ctx.call = (training or relu, eps, relu, residual is not None)\n",
        FUSED,
    ),
    mutant(
        "epilogue: the gradient of a ReLU after a sum is not masked",
        "autograd/functions.py",
        "            if has_residual:\n                grad = ops.threshold_backward(grad, passed, 0)\n",
        "            if has_residual:\n                pass\n",
        FUSED,
    ),
    mutant(
        "epilogue: forward mode outside of torch.func is ignored",
        "autograd/functions.py",
        "    if (residual is not None or relu) and (transformed or is_in_onnx_export()):\n",
        "    if (residual is not None or relu) and (transforms_active() or is_in_onnx_export()):\n",
        FUSED,
    ),
    mutant(
        "fakes: saved statistics of float64 inputs are float32",
        "_ops/fakes.py",
        "    return torch.float64 if dtype == torch.float64 else torch.float32\n",
        "    return torch.float32\n",
        REGISTRATION,
    ),
    mutant(
        "fakes: results have the strides of the input",
        "_ops/fakes.py",
        "    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)\n",
        "    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)\n",
        REGISTRATION,
    ),
    mutant(
        "fakes: relu_bounds is also returned with a residual",
        "_ops/fakes.py",
        "if relu and residual is None else statistic.new_empty(0)",
        "if relu else statistic.new_empty(0)",
        FUSED_OPCHECK,
    ),
    mutant(
        "fakes: tracing accepts weight and bias of different dtypes",
        "_ops/fakes.py",
        "        if one is not None and other is not None and one.dtype != other.dtype:\n",
        '        if one is not None and other is not None and names[0] != "weight" and one.dtype != other.dtype:\n',
        FAKES,
    ),
    mutant(
        "fakes: tracing accepts float32 parameters for float64 inputs",
        "_ops/fakes.py",
        "    dtypes = {dtype, torch.float32} if dtype in (torch.float16, torch.bfloat16) else {dtype}\n",
        "    dtypes = {dtype, torch.float32}\n",
        FAKES,
    ),
    mutant(
        "reference: the running variance is the biased one",
        "reference.py",
        "factor * var * (n / (n - 1))\n",
        "factor * var\n",
        REFERENCE,
    ),
    mutant(
        "reference: the sign of the last term of dx",
        "reference.py",
        "        dx = g - dbias[:, None] / n - xhat * dweight[:, None] / n\n",
        "        dx = g - dbias[:, None] / n + xhat * dweight[:, None] / n\n",
        REFERENCE,
    ),
    mutant(
        "reference: momentum weighs the old statistics",
        "reference.py",
        "            new_mean = (1 - factor) * new_mean + factor * mean\n",
        "            new_mean = factor * new_mean + (1 - factor) * mean\n",
        REFERENCE,
    ),
    mutant(
        "tolerance: a NaN is within every bound",
        "testing/tolerance.py",
        "    ratio = torch.where(got.isnan(), math.inf, ratio)\n",
        "    ratio = torch.where(got.isnan(), 0.0, ratio)\n",
        TOLERANCE,
    ),
    mutant(
        "tolerance: any output is right where the reference is not finite",
        "testing/tolerance.py",
        "torch.where(got.isfinite(), math.inf, 0.0))\n",
        "0.0)\n",
        TOLERANCE,
    ),
    mutant(
        "tolerance: the condition number of the variance counts twice for y",
        "testing/tolerance.py",
        "    scale = s.w_times(weight, s.a + s.xhat.abs() * s.k[:, None])\n",
        "    scale = s.w_times(weight, s.a + s.xhat.abs() * s.k[:, None].square())\n",
        TOLERANCE,
    ),
    mutant(
        "tolerance: an infinity of the wrong sign is right where the output's dtype overflows",
        "testing/tolerance.py",
        "(threshold - got.sign() * ref).clamp_min(0)",
        "(threshold - ref.abs()).clamp_min(0)",
        TOLERANCE,
    ),
    mutant(
        "explain: the launch that masks a gradient is not counted",
        "explain/passes.py",
        " else 3) + self.masked\n",
        " else 3)\n",
        EXPLAIN,
    ),
    mutant(
        "explain: the ReLU of a sum reads one tensor, not two",
        "explain/passes.py",
        '"more": Traffic(2 * tensor, tensor), "masked"',
        '"more": Traffic(tensor, tensor), "masked"',
        EXPLAIN,
    ),
    mutant(
        "explain: a MIG slice has the whole GPU's bandwidth",
        "explain/devices.py",
        "                bandwidth * eighths / 8,\n",
        "                bandwidth,\n",
        EXPLAIN,
    ),
    mutant(
        "explain: an input that is copied first keeps the alignment of the original",
        "explain/spec.py",
        " and layout is None and x.is_contiguous(memory_format=own):\n",
        " and layout is None:\n",
        EXPLAIN,
    ),
    mutant(
        "explain_model: the residual of a call is ignored",
        "explain/model.py",
        "Epilogue(residual is not None, activation is not None)",
        "Epilogue(False, activation is not None)",
        EXPLAIN,
    ),
]
