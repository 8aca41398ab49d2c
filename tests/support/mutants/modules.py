"""Faults in the Python code of layers, conversion and ranks."""

from __future__ import annotations

from . import Mutant
from .package import FUSE_RESULTS, FUSED, SYNC, mutant

MODULES = ("tests/api/test_modules.py",)
ACT = ("tests/api/test_batch_norm_act.py",)
TRACERS = ("tests/api/test_tools.py", "-k", "fx or jit")
FUNCTION = ("tests/api/test_functional.py", "-k", "optional or missing or dtypes or strided or eps or empty")
CONVERT = ("tests/api/test_convert.py",)
CHECKPOINT = ("tests/api/test_amp_checkpoint.py", "-k", "contexts or statistics_update")


MUTANTS: list[Mutant] = [
    mutant(
        "module: momentum None is momentum 0.0",
        "modules.py",
        "        if momentum is None and num_batches_tracked is None:\n",
        "        if momentum is None:\n",
        MODULES,
    ),
    mutant(
        "module: a layer without running statistics counts batches",
        "modules.py",
        "                running_mean = running_var = num_batches_tracked = None\n",
        "                running_mean = running_var = None\n",
        MODULES,
    ),
    mutant(
        "module: the flag instead of the buffers decides whether eval uses running statistics",
        "modules.py",
        "            training = running_mean is None and running_var is None\n",
        "            training = not self.track_running_stats\n",
        MODULES,
    ),
    mutant(
        "module: torch.fx records one call although the module has hooks",
        "modules.py",
        "        return self is not tracer.root and not _has_hooks(self)\n",
        "        return self is not tracer.root\n",
        TRACERS,
    ),
    mutant(
        "module: torch.jit.trace loses the residual",
        "modules.py",
        "with_epilogue(self._torch_forward(input), residual, None)",
        "with_epilogue(self._torch_forward(input), None, None)",
        FUSED,
    ),
    mutant(
        "module: quantization silently leaves the layers in floating point",
        "modules.py",
        'if any(cls.__module__.startswith("torch.ao.") for cls in type(tracer).__mro__):\n',
        "if False:\n",
        ("tests/api/test_tools_reverted.py", "-k", "graph_mode"),
    ),
    mutant(
        "BatchNormAct2d: hooks of the activation do not run",
        "modules.py",
        "        for module in (bn, act):\n",
        "        for module in (bn,):\n",
        ACT,
    ),
    mutant(
        "BatchNormAct2d: a subclass in place of its BatchNorm is not called",
        "modules.py",
        "        if type(bn) is not BatchNorm2d or type(act)",
        "        if not isinstance(bn, BatchNorm2d) or type(act)",
        ACT,
    ),
    mutant(
        "BatchNormAct2d: torch.jit.trace does not record torch's operators",
        "modules.py",
        "        return isinstance(x, Tensor) and not is_tracing()\n",
        "        return isinstance(x, Tensor)\n",
        ACT,
    ),
    mutant(
        "BatchNormAct2d: num_batches_tracked of a BatchNorm's state_dict is not renamed",
        "modules.py",
        '("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):',
        '("weight", "bias", "running_mean", "running_var"):',
        ACT,
    ),
    mutant(
        "batch_norm: a residual of another dtype is passed to the kernel",
        "functional.py",
        "residual.shape == input.shape and residual.dtype == input.dtype and residual.device",
        "residual.shape == input.shape and residual.device",
        FUSED,
    ),
    mutant(
        "batch_norm: no activation after a residual that torch adds",
        "functional.py",
        "            return with_epilogue(autograd.batch_norm(input, weight, bias, spec), residual, activation)\n",
        "            return with_epilogue(autograd.batch_norm(input, weight, bias, spec), residual, None)\n",
        FUSED,
    ),
    mutant(
        "batch_norm: inference without running_var does not raise torch's error",
        "functional.py",
        "    if not training and (running_mean is None or running_var is None):\n",
        "    if not training and running_mean is None:\n",
        FUNCTION,
    ),
    mutant(
        "convert: subclasses are converted",
        "convert.py",
        "    if type(module) not in classes:\n",
        "    if not isinstance(module, tuple(classes)):\n",
        CONVERT,
    ),
    mutant(
        "convert: a module whose forward has been replaced is converted",
        "convert.py",
        '    if "forward" in module.__dict__:\n        return "its forward was replaced on the instance"\n',
        "",
        CONVERT,
    ),
    mutant(
        "convert: the layer is rebuilt from parameters and buffers: eps, momentum, mode and hooks are lost",
        "convert.py",
        "        module.__class__ = after  # type: ignore[assignment]\n",
        "        fresh = after(module.num_features)  # type: ignore[call-arg]\n"
        "        fresh._parameters, fresh._buffers = module._parameters, module._buffers\n"
        "        module.__dict__.clear()\n"
        "        module.__dict__.update(fresh.__dict__)\n"
        "        module.__class__ = after  # type: ignore[assignment]\n",
        CONVERT,
    ),
    mutant(
        "convert: a converted layer is in training mode",
        "convert.py",
        "        module.__class__ = after  # type: ignore[assignment]\n",
        "        module.__class__ = after  # type: ignore[assignment]\n        module.train()\n",
        CONVERT,
    ),
    mutant(
        "explain_model: reports only this package's layers",
        "explain/model.py",
        "isinstance(module, _BatchNorm) and not reason_to_leave(module):\n",
        "False:\n",
        ("tests/plan/test_explain_model.py", "-k", "agrees"),
    ),
    mutant(
        "batch_norm: a residual that torch cannot add is rejected after the statistics have changed",
        "functional.py",
        "            check_residual(residual, input, activation)\n",
        "",
        ("tests/api/test_errors.py", "-k", "changes_nothing and residual"),
    ),
    mutant(
        "batch_norm: the error does not name the argument that is not a tensor",
        "errors.py",
        '        elif value is not None or name == "input":\n',
        '        elif name == "input":\n',
        ("tests/api/test_errors.py", "-k", "name_the_argument"),
    ),
    mutant(
        "revert: SyncBatchNorm keeps an attribute of this package",
        "convert.py",
        '            module.__dict__.pop("qualified_name", None)\n',
        "            pass\n",
        CONVERT,
    ),
    mutant(
        "revert: fuse() is not undone",
        "convert.py",
        "    return unfuse(model)\n",
        "    return model\n",
        FUSE_RESULTS,
    ),
    mutant(
        "no_statistics_update: an exception leaves the layers without updates",
        "running_stats.py",
        "    try:\n"
        "        for module in running_stats:\n"
        "            module.track_running_stats = False\n"
        "        yield\n"
        "    finally:\n"
        "        for module in running_stats:\n"
        "            module.track_running_stats = True\n",
        "    for module in running_stats:\n"
        "        module.track_running_stats = False\n"
        "    yield\n"
        "    for module in running_stats:\n"
        "        module.track_running_stats = True\n",
        CHECKPOINT,
    ),
    mutant(
        "no_statistics_update: layers without tracking track afterwards",
        "running_stats.py",
        "    running_stats = [module for module in batch_norms if module.track_running_stats]\n",
        "    running_stats = list(batch_norms)\n",
        CHECKPOINT,
    ),
    mutant(
        "checkpoint_contexts: torch's layers do not track during recomputation",
        "running_stats.py",
        "if isinstance(module, ForwardMixin))",
        "if isinstance(module, _BatchNorm))",
        CHECKPOINT,
    ),
    mutant(
        "ranks: rows are exchanged in float32",
        "ranks.py",
        "            gather(rows.view(-1), row, group=self.group)\n",
        "            narrow = rows.float()\n"
        "            gather(narrow.view(-1), row.float(), group=self.group)\n"
        "            rows.copy_(narrow)\n",
        SYNC,
    ),
    mutant(
        "SyncBatchNorm: a rank without data does not participate",
        "sync.py",
        "        if size < 2:  # -1: this rank is not in the group\n",
        "        if size < 2 or input.numel() == 0:\n",
        SYNC,
    ),
    mutant(
        "SyncBatchNorm: its process group is ignored",
        "sync.py",
        "self.process_group if self.process_group is not None else dist.group.WORLD",
        "dist.group.WORLD",
        SYNC,
    ),
    mutant(
        "SyncBatchNorm: ranks exchange statistics in eval mode",
        "sync.py",
        "        if not (self.training and dist.is_available() and dist.is_initialized()):\n",
        "        if not (dist.is_available() and dist.is_initialized()):\n",
        SYNC,
    ),
    mutant(
        "SyncBatchNorm: a layer without tracking updates its statistics",
        "sync.py",
        "        if self.track_running_stats:\n",
        "        if self.running_mean is not None:\n",
        SYNC,
    ),
    mutant(
        "sync: ranks of uneven batches have the same weight",
        "autograd/synchronised.py",
        '        rows = ranks.gather(ops.sync_statistics(x, eps), x, "the forward")\n',
        '        rows = ranks.gather(ops.sync_statistics(x, eps), x, "the forward")\n'
        "        rows[:, -1] = rows[:, -1].mean()\n",
        SYNC,
    ),
    mutant(
        "sync: ranks exchange gradients although the input needs none",
        "autograd/synchronised.py",
        "        dx = None\n"
        "        if need_input:\n"
        '            rows = ranks.gather(row, x, "the backward")\n'
        "            dx = ops",
        '        dx, rows = None, ranks.gather(row, x, "the backward")\n        if need_input:\n            dx = ops',
        SYNC,
    ),
    mutant(
        "sync: the gradients of weight and bias are swapped",
        "autograd/synchronised.py",
        "        return dx, dweight if need_weight and weight is not None else None, dbias if need_bias else None\n",
        "        return dx, dbias if need_weight and weight is not None else None, dweight if need_bias else None\n",
        SYNC,
    ),
    mutant(
        "sync: the derivative of a sum over ranks is the rank's own",
        "autograd/synchronised.py",
        "        return Total.apply(grad, ctx.ranks), None\n",
        "        return grad, None\n",
        SYNC,
    ),
    mutant(
        "sync: transforms of torch.func are accepted",
        "autograd/synchronised.py",
        "    if transforms_active() or forward_ad._current_level >= 0:\n",
        "    if forward_ad._current_level >= 0:\n",
        SYNC,
    ),
]
