"""Faults of the Python of derivatives, fakes, the reference, the gate and explain()."""

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
GATE = ("tests/numerics/test_tolerance.py",)
EXPLAIN = ("tests/plan/test_explain.py", "tests/plan/test_explain_model.py")


MUTANTS: list[Mutant] = [
    mutant(
        "autograd: every gradient is computed, needed or not",
        "autograd/functions.py",
        "        need_input, need_weight, need_bias, _, *need_residual = ctx.needs_input_grad\n",
        "        need_input, need_weight, need_bias, *need_residual = True, weight is not None, True, *ctx.needs_input_grad[4:]\n",
        AUTOGRAD,
    ),
    mutant(
        "autograd: the backward of inference reads the running mean, not its own forward's",
        "autograd/functions.py",
        "        ctx.save_for_backward(x, weight, mean, invstd)\n",
        "        ctx.save_for_backward(x, weight, mean if training else running_mean, invstd)\n",
        AUTOGRAD,
    ),
    mutant(
        "autograd: forward mode outside of torch.func is not looked for",
        "autograd/functions.py",
        "    if transformed:\n        outputs:",
        "    if transforms_active():\n        outputs:",
        AUTOGRAD,
    ),
    mutant(
        "autograd: tangents of a gradient are lost where the forward was outside of the dual level",
        "autograd/functions.py",
        "        again = is_grad_enabled() or transforms_active() or forward_ad._current_level >= 0\n",
        "        again = is_grad_enabled() or transforms_active()\n",
        AUTOGRAD,
    ),
    mutant(
        "autograd: the first gradient is not differentiable",
        "autograd/functions.py",
        "        again = is_grad_enabled() or transforms_active() or forward_ad._current_level >= 0\n",
        "        again = transforms_active() or forward_ad._current_level >= 0\n",
        AUTOGRAD,
    ),
    mutant(
        "autograd: running_var that requires a gradient is not refused",
        "autograd/functions.py",
        "        or (running_var is not None and running_var.requires_grad)\n",
        "",
        AUTOGRAD,
    ),
    mutant(
        "autograd: a bias that alone requires a gradient gets none",
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
        "double backward: the cotangent of the weight's gradient is taken to be the same on all ranks",
        "autograd/formulas.py",
        "            input_terms.append(s.invstd * s.project(a * g))  # a may differ from rank to rank\n",
        "            input_terms.append(a * s.invstd * s.project(g))\n",
        SYNC,
    ),
    mutant(
        "double backward over ranks: means of the ranks are averaged, however many values each has",
        "autograd/formulas.py",
        "        return self.spread(self.total(self.sum(v)) / self.count.to(self.dtype))\n",
        "        ranks = self.total(torch.ones_like(self.count)).to(self.dtype)\n"
        "        return self.spread(self.total(v.mean(self.others)) / ranks)\n",
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
        "double backward of a ReLU: the range keeps what is outside",
        "autograd/formulas.py",
        "    return grad.masked_fill((value < low) | (value > high), 0)\n",
        "    return grad.masked_fill((value < low) & (value > high), 0)\n",
        FUSED,
    ),
    mutant(
        "vmap: the bias is folded by the weight's batch dimension",
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
        "vmap: each model's cumulative average is applied to a channel",
        "autograd/batching.py",
        "        if isinstance(factor, Tensor) and factor_dim is not None:\n            factor = factor.view(-1, 1)\n",
        "",
        FUNC,
    ),
    mutant(
        "vmap: examples that normalise one input may not share buffers",
        "autograd/batching.py",
        "    if x_dim is not None and any(",
        "    if any(",
        FUNC,
    ),
    mutant(
        "fused: a residual that alone requires a gradient gets none",
        "autograd/functions.py",
        "        or (residual is not None and residual.requires_grad)\n",
        "",
        FUSED,
    ),
    mutant(
        "fused: the backward of inference is training's",
        "autograd/functions.py",
        "        ctx.call = (training, eps, relu)\n",
        "        ctx.call = (training or relu, eps, relu)\n",
        FUSED,
    ),
    mutant(
        "fused: the gradient behind a sum's ReLU is not masked",
        "autograd/functions.py",
        "            if need_residual:\n                grad = ops.threshold_backward(grad, passed[0], 0)\n",
        "            if need_residual:\n                pass\n",
        FUSED,
    ),
    mutant(
        "fused: forward mode outside of torch.func is not looked for",
        "autograd/functions.py",
        "    if (residual is not None or relu) and (transformed or is_in_onnx_export()):\n",
        "    if (residual is not None or relu) and (transforms_active() or is_in_onnx_export()):\n",
        FUSED,
    ),
    mutant(
        "fakes: saved statistics of float64 inputs are float32",
        "fakes.py",
        "    return torch.float64 if dtype == torch.float64 else torch.float32\n",
        "    return torch.float32\n",
        REGISTRATION,
    ),
    mutant(
        "fakes: results have the strides of the input",
        "fakes.py",
        "    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)\n",
        "    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)\n",
        REGISTRATION,
    ),
    mutant(
        "fakes: a relu_bounds beside a residual, too",
        "fakes.py",
        "if relu and residual is None else statistic.new_empty(0)",
        "if relu else statistic.new_empty(0)",
        FUSED_OPCHECK,
    ),
    mutant(
        "fakes: weight and bias of two dtypes pass when they are traced",
        "fakes.py",
        "        if one is not None and other is not None and one.dtype != other.dtype:\n",
        '        if one is not None and other is not None and names[0] != "weight" and one.dtype != other.dtype:\n',
        FAKES,
    ),
    mutant(
        "fakes: float64 inputs take float32 parameters when they are traced",
        "fakes.py",
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
        "gate: a NaN is within every bound",
        "testing/tolerance.py",
        "    ratio = torch.where(got.isnan(), math.inf, ratio)\n",
        "    ratio = torch.where(got.isnan(), 0.0, ratio)\n",
        GATE,
    ),
    mutant(
        "gate: any output is right where the reference is not finite",
        "testing/tolerance.py",
        "torch.where(got.isfinite(), math.inf, 0.0))\n",
        "0.0)\n",
        GATE,
    ),
    mutant(
        "gate: the condition number of the variance counts twice for y",
        "testing/tolerance.py",
        "    scale = s.w_times(weight, s.a + s.xhat.abs() * s.k[:, None])\n",
        "    scale = s.w_times(weight, s.a + s.xhat.abs() * s.k[:, None].square())\n",
        GATE,
    ),
    mutant(
        "gate: an infinity of the other sign is right where the output's dtype overflows",
        "testing/tolerance.py",
        "(threshold - got.sign() * ref).clamp_min(0)",
        "(threshold - ref.abs()).clamp_min(0)",
        GATE,
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
        "explain: an input that is copied first is unaligned where it lies",
        "explain/spec.py",
        " and layout is None and x.is_contiguous(memory_format=own):\n",
        " and layout is None:\n",
        EXPLAIN,
    ),
    mutant(
        "explain_model: the residual of a call is not seen",
        "explain/model.py",
        "Epilogue(residual is not None, activation is not None)",
        "Epilogue(False, activation is not None)",
        EXPLAIN,
    ),
]
