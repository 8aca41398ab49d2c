"""Faults of the Python of fuse(): its pass over captured graphs, backends and report."""

from __future__ import annotations

from . import Mutant
from .package import FUSE_RESULTS, mutant

FUSE = ("tests/compile/test_fuse.py",)
FUSE_NETWORKS = ("tests/compile/test_fuse_networks.py", "-k", "not inductor and not library_model")


MUTANTS: list[Mutant] = [
    mutant(
        "fuse: the sum's alpha is ignored",
        "fx/calls.py",
        ' and node.kwargs.get("alpha", 1) == 1\n',
        "\n",
        FUSE,
    ),
    mutant(
        "fuse: a sum with out= is fused",
        "fx/calls.py",
        '    plain = node.kwargs.keys() <= {"input", "other", "alpha"} and node',
        "    plain = node",
        FUSE,
    ),
    mutant(
        "fuse: relu6 is fused as a ReLU",
        "fx/calls.py",
        "_RELU_FUNCTIONS = {F.relu, torch.relu, torch.relu_}\n",
        "_RELU_FUNCTIONS = {F.relu, F.relu6, torch.relu, torch.relu_}\n",
        FUSE,
    ),
    mutant(
        "fuse: add_ does not count as an in-place write",
        "fx/calls.py",
        '_ADD_IN_PLACE = {operator.iadd, "add_", "__iadd__"}\n',
        '_ADD_IN_PLACE = {operator.iadd, "__iadd__"}\n',
        FUSE,
    ),
    mutant(
        "fuse: the normalised value may have other users",
        "fx/patterns.py",
        "    if len(node.users) != 1:\n"
        '        return f"its result is used in {len(node.users)} places"\n'
        "    (user,) = node.users\n",
        "    user = next(iter(node.users))\n",
        FUSE,
    ),
    mutant(
        "fuse: the sum may have other users",
        "fx/patterns.py",
        "    relu = next(iter(last.users)) if len(last.users) == 1 else None\n",
        "    relu = next(iter(last.users), None)\n",
        FUSE_NETWORKS,
    ),
    mutant(
        "fuse: the second operand of a sum is the residual",
        "fx/patterns.py",
        "        (residual,) = (operand for operand in operands(user) if operand is not node)\n",
        "        residual = operands(user)[1]\n",
        FUSE,
    ),
    mutant(
        "fuse: a residual of another layout is fused",
        "fx/patterns.py",
        "tensor.device != result.device or not _same_layout(other, call.node):\n",
        "tensor.device != result.device:\n",
        FUSE,
    ),
    mutant(
        "fuse: an in-place sum into a tensor that the caller holds is fused",
        "fx/patterns.py",
        "        if memory.is_shared(target):\n"
        '            return "the addition writes in place to a tensor with other users"\n',
        "",
        FUSE,
    ),
    mutant(
        "fuse: an in-place sum into a tensor that is read later is fused",
        "fx/patterns.py",
        "            if not aliases <= derived:\n"
        '                return "the addition writes in place to a tensor with other users"\n',
        "",
        FUSE,
    ),
    mutant(
        "fuse: grad mode or autocast may change between the layer and its epilogue",
        "fx/patterns.py",
        "    if any(is_barrier(each) for each in between):\n"
        '        return "a mode may change between it and what follows"\n',
        "",
        FUSE,
    ),
    mutant(
        "fuse: the residual may be written between the layer and the sum",
        "fx/patterns.py",
        "        if any(overlap(memory.of(residual), memory.written(each)) for each in until):\n"
        '            return "an operation between it and the addition may change its residual"\n',
        "",
        FUSE,
    ),
    mutant(
        "fuse: weight and bias may be written between the layer and the sum",
        "fx/patterns.py",
        'for name in ("input", "weight", "bias")))\n    statistics',
        'for name in ("input",)))\n    statistics',
        FUSE,
    ),
    mutant(
        "fuse: a call moves past another call of the same layer",
        "fx/patterns.py",
        "        if overlap(read, memory.written(each)) or overlap(statistics, touched):\n",
        "        if overlap(read, memory.written(each)):\n",
        FUSE,
    ),
    mutant(
        "fuse: running statistics may be read between the layer and the sum",
        "fx/patterns.py",
        "        touched = memory.written(each) | (memory.read(each) if call.training else frozenset())\n",
        "        touched = memory.written(each)\n",
        FUSE,
    ),
    mutant(
        "fuse: a second residual replaces the first",
        "fx/patterns.py",
        "        if residual is not None:\n"
        '            return "it has a residual already, and another addition"\n'
        "        if reason",
        "        if reason",
        FUSE,
    ),
    mutant(
        "fuse: a sum after a layer with an activation is fused before the activation",
        "fx/patterns.py",
        '    if arguments["activation"] is not None:\n        return "it has an activation already"\n',
        "",
        FUSE,
    ),
    mutant(
        "fuse: out= does not count as written",
        "fx/memory.py",
        'name.endswith("_") or "out" in node.kwargs or name in',
        'name.endswith("_") or name in',
        FUSE,
    ),
    mutant(
        "fuse: a positional inplace=True is ignored",
        "fx/memory.py",
        "    return position is not None and position < len(node.args) and node.args[position] is not False\n",
        "    return False\n",
        FUSE,
    ),
    mutant(
        "fuse: methods whose name ends in _ do not count as writes",
        "fx/memory.py",
        '(name.endswith("_") and not name.endswith("__")) or name.startswith(',
        "name.startswith(",
        FUSE,
    ),
    mutant(
        "fuse: a view counts as separate memory",
        "fx/memory.py",
        "            yield value.untyped_storage()._cdata\n",
        "            yield id(value)\n",
        FUSE,
    ),
    mutant(
        "fuse: inputs are assumed never to overlap",
        "fx/memory.py",
        "        if found & self._of_inputs:\n            found.add(_INPUTS)\n",
        "",
        FUSE,
    ),
    mutant(
        "fuse: nested graphs are skipped",
        "fx/backend.py",
        "    for module in graph_module.modules():\n        if not isinstance(module, fx.GraphModule):\n",
        "    for module in [graph_module]:\n        if not isinstance(module, fx.GraphModule):\n",
        FUSE_RESULTS,
    ),
    mutant(
        "fuse: the recomputation of a checkpoint never updates statistics",
        "fx/backend.py",
        "if is_recomputation and updates_once else args\n",
        "if is_recomputation else args\n",
        FUSE_RESULTS,
    ),
    mutant(
        "fuse: other tracers and transforms run the compiled call",
        "fx/fuse.py",
        "        if torch.compiler.is_compiling() or _is_traced():\n",
        "        if torch.compiler.is_compiling():\n",
        FUSE_RESULTS,
    ),
    mutant(
        "unfuse: submodules stay fused",
        "fx/fuse.py",
        "    for module in model.modules():\n",
        "    for module in [model]:\n",
        FUSE_RESULTS,
    ),
    mutant(
        "fuse: all models share TorchDynamo's limit of graphs",
        "fx/fuse.py",
        "    call.__code__ = call.__code__.replace(co_name=type(model).__name__)\n",
        "",
        FUSE_RESULTS,
    ),
]
