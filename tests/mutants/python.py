"""Faults of the Python: modules, conversion, derivatives, fakes, ranks, the fusing pass, the reference and its gate."""

from __future__ import annotations

from . import Mutant

MODULES = ("tests/test_modules.py",)
ACT = ("tests/test_batch_norm_act.py",)
TRACERS = ("tests/test_tools.py", "-k", "fx or jit")
FUNCTION = ("tests/test_functional.py", "-k", "optional or dtypes or strided or eps or nothing")
CONVERT = ("tests/test_convert.py",)
CHECKPOINT = ("tests/test_amp_checkpoint.py", "-k", "contexts or statistics_update")
AUTOGRAD = ("tests/test_autograd.py",)
FUNC = ("tests/test_func.py",)
COMPILE = ("tests/test_compile.py", "-k", "layers or transform")
FUSED = ("tests/test_fused.py", "-k", "not numbers and not compiled and not opcheck")
FUSED_OPCHECK = ("tests/test_fused.py", "-k", "opcheck")
FAKES = ("tests/test_fakes.py",)
REGISTRATION = ("tests/test_ops.py", "-k", "fakes or opcheck_of_training or (opcheck and (weight or 3-D))")
SYNC = ("tests/test_sync.py", "tests/test_sync_derivatives.py", "-k", "not compiled and not missing and not tells")
FUSE = ("tests/test_fuse.py",)
FUSE_NETWORKS = ("tests/test_fuse_networks.py", "-k", "not inductor and not a_model")
FUSE_RESULTS = (
    "tests/test_fuse_results.py",
    "-k",
    "undone or tracers or more_models or checkpointed or copies or lazy",
)
REFERENCE = ("tests/test_reference.py",)
GATE = ("tests/test_gate.py",)
EXPLAIN = ("tests/test_explain.py", "tests/test_explain_model.py")


def _mutant(fault: str, file: str, old: str, new: str, tests: tuple[str, ...]) -> Mutant:
    return Mutant(fault, f"bnkernels/{file}", old, new, tests)


MODULE_MUTANTS = [
    _mutant(
        "module: momentum None is momentum 0.0",
        "modules.py",
        "        if momentum is None and num_batches_tracked is None:\n",
        "        if momentum is None:\n",
        MODULES,
    ),
    _mutant(
        "module: a layer that does not track counts batches",
        "modules.py",
        "                running_mean = running_var = num_batches_tracked = None\n",
        "                running_mean = running_var = None\n",
        MODULES,
    ),
    _mutant(
        "module: the flag, not the buffers, says whether eval uses running statistics",
        "modules.py",
        "            training = running_mean is None and running_var is None\n",
        "            training = not self.track_running_stats\n",
        MODULES,
    ),
    _mutant(
        "module: recorded as one call by torch.fx although it has hooks",
        "modules.py",
        "        return self is not tracer.root and not any(hooks)\n",
        "        return self is not tracer.root\n",
        TRACERS,
    ),
    _mutant(
        "module: torch.jit.trace loses the residual",
        "modules.py",
        "with_epilogue(self._torchs_forward(input), residual, self.activation)",
        "with_epilogue(self._torchs_forward(input), None, self.activation)",
        FUSED,
    ),
    _mutant(
        "module: an activation that is assigned is not checked",
        "modules.py",
        '        if name == "activation":\n            check_activation(value)\n',
        "",
        ACT,
    ),
    _mutant(
        "BatchNormAct2d: hooks of the activation do not run",
        "modules.py",
        "for module in (bn, self.act))",
        "for module in (bn,))",
        ACT,
    ),
    _mutant(
        "BatchNormAct2d: a subclass in the place of its BatchNorm is not called",
        "modules.py",
        "        if type(bn) is BatchNorm2d and type(self.act)",
        "        if isinstance(bn, BatchNorm2d) and type(self.act)",
        ACT,
    ),
    _mutant(
        "BatchNormAct2d: torch.jit.trace does not get torch's operators",
        "modules.py",
        "            if isinstance(x, Tensor) and not is_tracing():\n",
        "            if isinstance(x, Tensor):\n",
        ACT,
    ),
    _mutant(
        "BatchNormAct2d: num_batches_tracked of a BatchNorm's state_dict is not moved",
        "modules.py",
        '("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):',
        '("weight", "bias", "running_mean", "running_var"):',
        ACT,
    ),
    _mutant(
        "batch_norm: a residual of another dtype goes to the kernel",
        "functional.py",
        "residual.shape == input.shape and residual.dtype == input.dtype and residual.device",
        "residual.shape == input.shape and residual.device",
        FUSED,
    ),
    _mutant(
        "batch_norm: no activation behind a residual that torch adds",
        "functional.py",
        "        return with_epilogue(y, residual, activation)\n",
        "        return with_epilogue(y, residual, None)\n",
        FUSED,
    ),
    _mutant(
        "batch_norm: inference without running_var is not refused in torch's words",
        "functional.py",
        "    if not training and (running_mean is None or running_var is None):\n",
        "    if not training and running_mean is None:\n",
        FUNCTION,
    ),
    _mutant(
        "convert: subclasses are converted",
        "convert.py",
        "        after = classes.get(before)\n",
        "        after = next((new for old, new in classes.items() if isinstance(module, old)), None)\n",
        CONVERT,
    ),
    _mutant(
        "convert: a module whose forward has been replaced is converted",
        "convert.py",
        '    if "forward" in module.__dict__:\n        return "its forward has been replaced on the object"\n',
        "",
        CONVERT,
    ),
    _mutant(
        "convert: the layer is made again, with parameters and buffers alone: eps, momentum, mode and hooks are lost",
        "convert.py",
        "        module.__class__ = after  # type: ignore[assignment]\n",
        "        fresh = after(module.num_features)  # type: ignore[call-arg]\n"
        "        fresh._parameters, fresh._buffers = module._parameters, module._buffers\n"
        "        module.__dict__.clear()\n"
        "        module.__dict__.update(fresh.__dict__)\n"
        "        module.__class__ = after  # type: ignore[assignment]\n",
        CONVERT,
    ),
    _mutant(
        "convert: a converted layer is in training",
        "convert.py",
        "        module.__class__ = after  # type: ignore[assignment]\n",
        "        module.__class__ = after  # type: ignore[assignment]\n        module.train()\n",
        CONVERT,
    ),
    _mutant(
        "convert: somebody else's attribute `activation` is taken for this package's",
        "convert.py",
        '    if getattr(module, "activation", None) is not None:\n',
        "    if isinstance(module, modules.ForwardMixin) and module.activation is not None:\n",
        FUSED,
    ),
    _mutant(
        "revert: SyncBatchNorm keeps an attribute of this package",
        "convert.py",
        '            module.__dict__.pop("qualified_name", None)\n',
        "            pass\n",
        CONVERT,
    ),
    _mutant(
        "revert: fuse() is not undone",
        "convert.py",
        "    return unfuse(model)\n",
        "    return model\n",
        FUSE_RESULTS,
    ),
    _mutant(
        "no_statistics_update: an exception leaves the layers so",
        "tracking.py",
        "    try:\n"
        "        for module in tracking:\n"
        "            module.track_running_stats = False\n"
        "        yield\n"
        "    finally:\n"
        "        for module in tracking:\n"
        "            module.track_running_stats = True\n",
        "    for module in tracking:\n"
        "        module.track_running_stats = False\n"
        "    yield\n"
        "    for module in tracking:\n"
        "        module.track_running_stats = True\n",
        CHECKPOINT,
    ),
    _mutant(
        "no_statistics_update: layers that did not track track afterwards",
        "tracking.py",
        "    tracking = [module for module in batch_norms if module.track_running_stats]\n",
        "    tracking = list(batch_norms)\n",
        CHECKPOINT,
    ),
    _mutant(
        "checkpoint_contexts: torch's layers do not track in the recomputation either",
        "tracking.py",
        "if isinstance(module, ForwardMixin))",
        "if isinstance(module, _BatchNorm))",
        CHECKPOINT,
    ),
]


DERIVATIVE_MUTANTS = [
    _mutant(
        "autograd: every gradient is computed, needed or not",
        "autograd/functions.py",
        "        need_input, need_weight, need_bias, _ = ctx.needs_input_grad\n",
        "        need_input, need_weight, need_bias = True, weight is not None, True\n",
        AUTOGRAD,
    ),
    _mutant(
        "autograd: the backward of inference reads the running mean, not its own forward's",
        "autograd/functions.py",
        "        ctx.save_for_backward(x, weight, mean, invstd)\n",
        "        ctx.save_for_backward(x, weight, mean if training else running_mean, invstd)\n",
        AUTOGRAD,
    ),
    _mutant(
        "autograd: forward mode outside of torch.func is not looked for",
        "autograd/functions.py",
        "    if transforms_active() or forward_ad._current_level >= 0:\n        outputs:",
        "    if transforms_active():\n        outputs:",
        AUTOGRAD,
    ),
    _mutant(
        "autograd: tangents of a gradient are lost where the forward was outside of the dual level",
        "autograd/functions.py",
        "        if is_grad_enabled() or transforms_active() or forward_ad._current_level >= 0:\n",
        "        if is_grad_enabled() or transforms_active():\n",
        AUTOGRAD,
    ),
    _mutant(
        "autograd: the first gradient is not differentiable",
        "autograd/functions.py",
        "        if is_grad_enabled() or transforms_active() or forward_ad._current_level >= 0:\n",
        "        if transforms_active() or forward_ad._current_level >= 0:\n",
        AUTOGRAD,
    ),
    _mutant(
        "autograd: running_var that requires a gradient is not refused",
        "autograd/functions.py",
        "        or (running_var is not None and running_var.requires_grad)\n",
        "",
        AUTOGRAD,
    ),
    _mutant(
        "autograd: a bias that alone requires a gradient gets none",
        "autograd/functions.py",
        " or (bias is not None and bias.requires_grad)\n    ):\n        rest",
        "\n    ):\n        rest",
        AUTOGRAD,
    ),
    _mutant(
        "autograd: a compiler that traces a transform of torch.func gets a Function",
        "autograd/functions.py",
        "            traced = formulas.forward\n",
        "            traced = _traced\n",
        COMPILE,
    ),
    _mutant(
        "autograd, compiled: the new count is not written back",
        "autograd/functions.py",
        "    for buffer, updated in zip(buffers, outputs[3:]):\n",
        "    for buffer, updated in zip(buffers[:2], outputs[3:]):\n",
        COMPILE,
    ),
    _mutant(
        "double backward: the sign of the input's second term",
        "autograd/formulas.py",
        "            input_terms.append(-s.scale(weight) * s.invstd * bracket)\n",
        "            input_terms.append(s.scale(weight) * s.invstd * bracket)\n",
        AUTOGRAD,
    ),
    _mutant(
        "double backward: the weight's term lacks invstd",
        "autograd/formulas.py",
        "            grad_weight = s.sum(projected_u * g * s.invstd)\n",
        "            grad_weight = s.sum(projected_u * g)\n",
        AUTOGRAD,
    ),
    _mutant(
        "double backward: the cotangent of the weight's gradient is taken to be the same on all ranks",
        "autograd/formulas.py",
        "            input_terms.append(s.invstd * s.project(a * g))  # a may differ from rank to rank\n",
        "            input_terms.append(a * s.invstd * s.project(g))\n",
        SYNC,
    ),
    _mutant(
        "double backward over ranks: means of the ranks are averaged, however many values each has",
        "autograd/formulas.py",
        "        return self.spread(self.total(self.sum(v)) / self.count.to(self.dtype))\n",
        "        ranks = self.total(torch.ones_like(self.count)).to(self.dtype)\n"
        "        return self.spread(self.total(v.mean(self.others)) / ranks)\n",
        SYNC,
    ),
    _mutant(
        "forward over reverse: a sign in the tangent of the projection",
        "autograd/formulas.py",
        "            dproject = -dxhat * s.mean(s.xhat * g) - s.xhat * s.mean(dxhat * g)  # (dP) g\n",
        "            dproject = -dxhat * s.mean(s.xhat * g) + s.xhat * s.mean(dxhat * g)  # (dP) g\n",
        FUNC,
    ),
    _mutant(
        "plain formula: the running variance is the biased one",
        "autograd/formulas.py",
        "(running_var, s.batch_var * (n / (n - 1)))",
        "(running_var, s.batch_var)",
        FUNC,
    ),
    _mutant(
        "double backward of a ReLU: the range keeps what is outside",
        "autograd/formulas.py",
        "    return grad.masked_fill((value < low) | (value > high), 0)\n",
        "    return grad.masked_fill((value < low) & (value > high), 0)\n",
        FUSED,
    ),
    _mutant(
        "vmap: the bias is folded by the weight's batch dimension",
        "autograd/batching.py",
        "        _fold_vector(bias, bias_dim, batch),\n        fresh_mean,\n",
        "        _fold_vector(bias, weight_dim, batch),\n        fresh_mean,\n",
        FUNC,
    ),
    _mutant(
        "vmap: batches are not counted",
        "autograd/batching.py",
        "        num_batches_tracked.add_(1)\n",
        "        pass\n",
        FUNC,
    ),
    _mutant(
        "vmap: each model's cumulative average is applied to a channel",
        "autograd/batching.py",
        "        if isinstance(factor, Tensor) and factor_dim is not None:\n            factor = factor.view(-1, 1)\n",
        "",
        FUNC,
    ),
    _mutant(
        "vmap: examples that normalise one input may not share buffers",
        "autograd/batching.py",
        "    if x_dim is not None and any(",
        "    if any(",
        FUNC,
    ),
    _mutant(
        "fused: the first gradient is not differentiable",
        "autograd/fused.py",
        "        again = is_grad_enabled() or transforms_active() or forward_ad._current_level >= 0\n",
        "        again = transforms_active() or forward_ad._current_level >= 0\n",
        FUSED,
    ),
    _mutant(
        "fused: tangents of a gradient are lost where the forward was outside of the dual level",
        "autograd/fused.py",
        "        again = is_grad_enabled() or transforms_active() or forward_ad._current_level >= 0\n",
        "        again = is_grad_enabled() or transforms_active()\n",
        FUSED,
    ),
    _mutant(
        "fused: a residual that alone requires a gradient gets none",
        "autograd/fused.py",
        "    if _differentiates(x, weight, bias, residual):\n",
        "    if _differentiates(x, weight, bias):\n",
        FUSED,
    ),
    _mutant(
        "fused: the backward of inference is training's",
        "autograd/fused.py",
        "        ctx.call = (training, eps, residual is not None)\n",
        "        ctx.call = (True, eps, residual is not None)\n",
        FUSED,
    ),
    _mutant(
        "fused: the gradient behind a sum's ReLU is not masked",
        "autograd/fused.py",
        "grad = ops.threshold_backward(grad, passed, 0) if adds",
        "grad = grad if adds",
        FUSED,
    ),
    _mutant(
        "fused: forward mode outside of torch.func is not looked for",
        "autograd/fused.py",
        "    composed = transforms_active() or forward_ad._current_level >= 0 or is_in_onnx_export()\n",
        "    composed = transforms_active() or is_in_onnx_export()\n",
        FUSED,
    ),
    _mutant(
        "fused: running statistics that require gradients are not refused",
        "autograd/fused.py",
        "    if composed or _differentiates(running_mean, running_var):\n",
        "    if composed:\n",
        FUSED,
    ),
    _mutant(
        "fakes: saved statistics of float64 inputs are float32",
        "fakes.py",
        "    return torch.float64 if dtype == torch.float64 else torch.float32\n",
        "    return torch.float32\n",
        REGISTRATION,
    ),
    _mutant(
        "fakes: results have the strides of the input",
        "fakes.py",
        "    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)\n",
        "    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)\n",
        REGISTRATION,
    ),
    _mutant(
        "fakes: a relu_range beside a residual, too",
        "fakes.py",
        "if relu and residual is None else statistic.new_empty(0)",
        "if relu else statistic.new_empty(0)",
        FUSED_OPCHECK,
    ),
    _mutant(
        "fakes: weight and bias of two dtypes pass when they are traced",
        "fakes.py",
        "        if one is not None and other is not None and one.dtype != other.dtype:\n",
        '        if one is not None and other is not None and names[0] != "weight" and one.dtype != other.dtype:\n',
        FAKES,
    ),
    _mutant(
        "fakes: float64 inputs take float32 parameters when they are traced",
        "fakes.py",
        "    dtypes = {dtype, torch.float32} if dtype in (torch.float16, torch.bfloat16) else {dtype}\n",
        "    dtypes = {dtype, torch.float32}\n",
        FAKES,
    ),
]


RANK_MUTANTS = [
    _mutant(
        "ranks: rows are exchanged in float32",
        "ranks.py",
        "            gather(rows.view(-1), row, group=self.group)\n",
        "            narrow = rows.float()\n"
        "            gather(narrow.view(-1), row.float(), group=self.group)\n"
        "            rows.copy_(narrow)\n",
        SYNC,
    ),
    _mutant(
        "SyncBatchNorm: a rank without data does not take part",
        "sync.py",
        "        if size < 2:  # -1: this rank is not in it\n",
        "        if size < 2 or input.numel() == 0:\n",
        SYNC,
    ),
    _mutant(
        "SyncBatchNorm: its process group is not used",
        "sync.py",
        "self.process_group if self.process_group is not None else dist.group.WORLD",
        "dist.group.WORLD",
        SYNC,
    ),
    _mutant(
        "SyncBatchNorm: exchanges in eval mode, too",
        "sync.py",
        "        if not (self.training and dist.is_available() and dist.is_initialized()):\n",
        "        if not (dist.is_available() and dist.is_initialized()):\n",
        SYNC,
    ),
    _mutant(
        "SyncBatchNorm: a layer that does not track updates its statistics",
        "sync.py",
        "        if self.track_running_stats:\n",
        "        if self.running_mean is not None:\n",
        SYNC,
    ),
    _mutant(
        "sync: ranks of uneven batches have the same weight",
        "autograd/synchronised.py",
        '        rows = ranks.gather(ops.sync_statistics(x, eps), x, "the forward")\n',
        '        rows = ranks.gather(ops.sync_statistics(x, eps), x, "the forward")\n'
        "        rows[:, -1] = rows[:, -1].mean()\n",
        SYNC,
    ),
    _mutant(
        "sync: ranks exchange although the input needs no gradient",
        "autograd/synchronised.py",
        "        dx = None\n"
        "        if need_input:\n"
        '            rows = ranks.gather(row, x, "the backward")\n'
        "            dx = ops",
        '        dx, rows = None, ranks.gather(row, x, "the backward")\n        if need_input:\n            dx = ops',
        SYNC,
    ),
    _mutant(
        "sync: the gradients of weight and bias are swapped",
        "autograd/synchronised.py",
        "        return dx, dweight if need_weight and weight is not None else None, dbias if need_bias else None\n",
        "        return dx, dbias if need_weight and weight is not None else None, dweight if need_bias else None\n",
        SYNC,
    ),
    _mutant(
        "sync: the derivative of a sum over ranks is the rank's own",
        "autograd/synchronised.py",
        "        return Total.apply(grad, ctx.ranks), None\n",
        "        return grad, None\n",
        SYNC,
    ),
    _mutant(
        "sync: transforms of torch.func are not refused",
        "autograd/synchronised.py",
        "    if transforms_active() or forward_ad._current_level >= 0:\n",
        "    if forward_ad._current_level >= 0:\n",
        SYNC,
    ),
]


FUSION_MUTANTS = [
    _mutant(
        "fuse: the sum's alpha is not looked at",
        "fx/calls.py",
        ' and node.kwargs.get("alpha", 1) == 1\n',
        "\n",
        FUSE,
    ),
    _mutant(
        "fuse: a sum that is written to out= is one like any other",
        "fx/calls.py",
        '    plain = node.kwargs.keys() <= {"input", "other", "alpha"} and node',
        "    plain = node",
        FUSE,
    ),
    _mutant(
        "fuse: relu6 is taken for a ReLU",
        "fx/calls.py",
        "_RELU_FUNCTIONS = {F.relu, torch.relu, torch.relu_}\n",
        "_RELU_FUNCTIONS = {F.relu, F.relu6, torch.relu, torch.relu_}\n",
        FUSE,
    ),
    _mutant(
        "fuse: add_ is not known to write in place",
        "fx/calls.py",
        '_ADD_IN_PLACE = {operator.iadd, "add_", "__iadd__"}\n',
        '_ADD_IN_PLACE = {operator.iadd, "__iadd__"}\n',
        FUSE,
    ),
    _mutant(
        "fuse: the normalised value may have other users",
        "fx/patterns.py",
        "    if len(node.users) != 1:\n"
        '        return f"its result is used in {len(node.users)} places"\n'
        "    (user,) = node.users\n",
        "    user = next(iter(node.users))\n",
        FUSE,
    ),
    _mutant(
        "fuse: the sum may have other users",
        "fx/patterns.py",
        "    relu = next(iter(last.users)) if len(last.users) == 1 else None\n",
        "    relu = next(iter(last.users), None)\n",
        FUSE_NETWORKS,
    ),
    _mutant(
        "fuse: the second operand of a sum is the residual",
        "fx/patterns.py",
        "        (residual,) = (operand for operand in operands(user) if operand is not node)\n",
        "        residual = operands(user)[1]\n",
        FUSE,
    ),
    _mutant(
        "fuse: a residual of another layout is fused",
        "fx/patterns.py",
        "tensor.device != result.device or not _same_layout(other, call.node):\n",
        "tensor.device != result.device:\n",
        FUSE,
    ),
    _mutant(
        "fuse: a sum in place into a tensor that the caller has",
        "fx/patterns.py",
        "        if memory.is_shared(target):\n"
        '            return "the addition writes to a tensor that others may see"\n',
        "",
        FUSE,
    ),
    _mutant(
        "fuse: a sum in place into a tensor that is read afterwards",
        "fx/patterns.py",
        "            if not aliases <= derived:\n"
        '                return "the addition writes to a tensor that others may see"\n',
        "",
        FUSE,
    ),
    _mutant(
        "fuse: grad mode or autocast may change between the layer and what follows",
        "fx/patterns.py",
        "    if any(is_barrier(each) for each in between):\n"
        '        return "a mode may change between it and what follows"\n',
        "",
        FUSE,
    ),
    _mutant(
        "fuse: the residual may be written between the layer and the sum",
        "fx/patterns.py",
        "        if any(overlap(memory.of(residual), memory.written(each)) for each in until):\n"
        '            return "what lies between it and the addition may change its residual"\n',
        "",
        FUSE,
    ),
    _mutant(
        "fuse: weight and bias may be written between the layer and the sum",
        "fx/patterns.py",
        'for name in ("input", "weight", "bias")))\n    statistics',
        'for name in ("input",)))\n    statistics',
        FUSE,
    ),
    _mutant(
        "fuse: a call moves past another call of the same layer",
        "fx/patterns.py",
        "        if overlap(read, memory.written(each)) or overlap(statistics, touched):\n",
        "        if overlap(read, memory.written(each)):\n",
        FUSE,
    ),
    _mutant(
        "fuse: running statistics may be read between the layer and the sum",
        "fx/patterns.py",
        "        touched = memory.written(each) | (memory.read(each) if call.training else frozenset())\n",
        "        touched = memory.written(each)\n",
        FUSE,
    ),
    _mutant(
        "fuse: a second residual takes the place of the first",
        "fx/patterns.py",
        "        if residual is not None:\n"
        '            return "it has a residual already, and another addition"\n'
        "        if reason",
        "        if reason",
        FUSE,
    ),
    _mutant(
        "fuse: a sum behind a layer with an activation is fused before the activation",
        "fx/patterns.py",
        '    if arguments["activation"] is not None:\n        return "it has an activation already"\n',
        "",
        FUSE,
    ),
    _mutant(
        "fuse: out= is not known to be written",
        "fx/memory.py",
        'name.endswith("_") or "out" in node.kwargs or name in',
        'name.endswith("_") or name in',
        FUSE,
    ),
    _mutant(
        "fuse: inplace=True by position is not seen",
        "fx/memory.py",
        "    return position is not None and position < len(node.args) and node.args[position] is not False\n",
        "    return False\n",
        FUSE,
    ),
    _mutant(
        "fuse: methods whose name ends in _ are not known to write",
        "fx/memory.py",
        '(name.endswith("_") and not name.endswith("__")) or name.startswith(',
        "name.startswith(",
        FUSE,
    ),
    _mutant(
        "fuse: a view is memory of its own",
        "fx/memory.py",
        "            yield value.untyped_storage()._cdata\n",
        "            yield id(value)\n",
        FUSE,
    ),
    _mutant(
        "fuse: inputs are taken never to overlap",
        "fx/memory.py",
        "        if found & self._of_inputs:\n            found.add(_INPUTS)\n",
        "",
        FUSE,
    ),
    _mutant(
        "fuse: graphs within a graph are left out",
        "fx/backend.py",
        "    for module in graph_module.modules():\n        if not isinstance(module, fx.GraphModule):\n",
        "    for module in [graph_module]:\n        if not isinstance(module, fx.GraphModule):\n",
        FUSE_RESULTS,
    ),
    _mutant(
        "fuse: the recomputation of a checkpoint never updates statistics",
        "fx/backend.py",
        "if recomputes and once else args, True\n",
        "if recomputes else args, True\n",
        FUSE_RESULTS,
    ),
    _mutant(
        "fuse: other tracers and transforms get the compiled call",
        "fx/fuse.py",
        "        if torch.compiler.is_compiling() or _is_traced():\n",
        "        if torch.compiler.is_compiling():\n",
        FUSE_RESULTS,
    ),
    _mutant(
        "unfuse: submodules stay fused",
        "fx/fuse.py",
        "    for module in model.modules():\n",
        "    for module in [model]:\n",
        FUSE_RESULTS,
    ),
    _mutant(
        "fuse: all models share the limit of TorchDynamo's graphs",
        "fx/fuse.py",
        "    call.__code__ = call.__code__.replace(co_name=type(model).__name__)\n",
        "",
        FUSE_RESULTS,
    ),
]


TRUTH_MUTANTS = [
    _mutant(
        "reference: the running variance is the biased one",
        "reference.py",
        "factor * var * (n / (n - 1))\n",
        "factor * var\n",
        REFERENCE,
    ),
    _mutant(
        "reference: the sign of the last term of dx",
        "reference.py",
        "        dx = g - dbias[:, None] / n - xhat * dweight[:, None] / n\n",
        "        dx = g - dbias[:, None] / n + xhat * dweight[:, None] / n\n",
        REFERENCE,
    ),
    _mutant(
        "reference: momentum weighs the old statistics",
        "reference.py",
        "            new_mean = (1 - factor) * new_mean + factor * mean\n",
        "            new_mean = factor * new_mean + (1 - factor) * mean\n",
        REFERENCE,
    ),
    _mutant(
        "gate: a NaN is within every bound",
        "testing/gate.py",
        "    ratio = torch.where(got.isnan(), math.inf, ratio)\n",
        "    ratio = torch.where(got.isnan(), 0.0, ratio)\n",
        GATE,
    ),
    _mutant(
        "gate: any output is right where the reference is not finite",
        "testing/gate.py",
        "torch.where(got.isfinite(), math.inf, 0.0))\n",
        "0.0)\n",
        GATE,
    ),
    _mutant(
        "gate: the condition number of the variance counts twice for y",
        "testing/gate.py",
        "    scale = s.w_times(weight, s.a + s.xhat.abs() * s.k[:, None])\n",
        "    scale = s.w_times(weight, s.a + s.xhat.abs() * s.k[:, None].square())\n",
        GATE,
    ),
    _mutant(
        "gate: an infinity of the other sign is right where the output's dtype overflows",
        "testing/gate.py",
        "(threshold - got.sign() * ref).clamp_min(0)",
        "(threshold - ref.abs()).clamp_min(0)",
        GATE,
    ),
    _mutant(
        "explain: the launch that masks a gradient is not counted",
        "explain/passes.py",
        " else 3) + self.masked\n",
        " else 3)\n",
        EXPLAIN,
    ),
    _mutant(
        "explain: the ReLU of a sum reads one tensor, not two",
        "explain/passes.py",
        '"more": Traffic(2 * tensor, tensor), "masked"',
        '"more": Traffic(tensor, tensor), "masked"',
        EXPLAIN,
    ),
    _mutant(
        "explain: a MIG slice has the whole GPU's bandwidth",
        "explain/devices.py",
        "                bandwidth * eighths / 8,\n",
        "                bandwidth,\n",
        EXPLAIN,
    ),
    _mutant(
        "explain: an input that is copied first is unaligned where it lies",
        "explain/subject.py",
        " and layout is None and x.is_contiguous(memory_format=own):\n",
        " and layout is None:\n",
        EXPLAIN,
    ),
    _mutant(
        "explain_model: the residual of a call is not seen",
        "explain/model.py",
        'Epilogue(given.get("residual") is not None, relu)',
        "Epilogue(False, relu)",
        EXPLAIN,
    ),
]


MUTANTS: list[Mutant] = [
    *MODULE_MUTANTS,
    *DERIVATIVE_MUTANTS,
    *RANK_MUTANTS,
    *FUSION_MUTANTS,
    *TRUTH_MUTANTS,
]
