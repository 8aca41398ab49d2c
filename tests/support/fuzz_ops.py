"""Random calls of every op of the extension, through both entry points: torch.ops.bnkernels.* and the pybind functions.

A round draws an input (shape, dtypes, layouts, values, eps, momentum, optional tensors) and makes a chain of calls with
it: a forward and its backward, in training or inference, with or without an epilogue; or the steps of a batch on
several ranks. Some calls are preceded by the same call with one invalid argument.

    valid      does not raise; results are within tolerance of the float64 reference; only the running statistics and
               the counter are written, and their versions are bumped
    invalid    raises an error about the arguments, not an internal assertion; nothing has changed

    PYTHONPATH=.:tests/support python tests/support/fuzz_ops.py --first 0 --count 5000
    PYTHONPATH=.:tests/support python -m fake_cuda tests/support/fuzz_ops.py --device cuda --count 50

Under AddressSanitizer, in a separate clone, as this clone's library is built without it:

    CFLAGS="-fsanitize=address -fno-omit-frame-pointer" LDFLAGS=-fsanitize=address FORCE_CUDA=0 \
        python setup.py -q build_ext --inplace
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" \
        ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONPATH=.:tests/support \
        python tests/support/fuzz_ops.py --calls 100000 --threads 2

Prints how many calls of each op were valid and invalid. Exit code 1: a check failed; the round's seed is printed.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from fuzz_arguments import Arguments, Memory, arrange_data, arrange_read, arrange_running, parameter_dtypes, spoil
from torch import Tensor

from bnkernels import _ops as ops
from bnkernels import testing
from bnkernels.testing import Case, Inputs, Outputs, assert_within, same_bits

EXTENTS = (*range(1, 10), 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300)
# Some of these have a reciprocal root in float32, some do not.
EPS = (1e-5, 1e-5, 1e-5, 1e-3, 1e-12, 1e-30, 1.0, 1e10, 1e60, math.inf)
LEAST_EPS_OF_FLOAT64 = 1e-12
"""Below it the rounding of the reference's own mean dominates: the variance of a constant channel is not 0."""
MOMENTA = (0.1, 0.1, None, None, 0.0, 1.0, 0.3, 1e-30, 1e30, math.nan, math.inf)
COUNTS = (0, 4, 1 << 40)
REFUSED_SHARE = 0.3
LARGER_SHARE, LARGER = 0.02, 25  # inputs that several threads share
REFUSALS = (RuntimeError, ValueError, TypeError)

# By the names of the ops in the schema: the registered op, and its pybind function if there is one.
ENTRY_POINTS: dict[str, tuple[Callable[..., Any], ...]] = {
    "train": (ops.train_op, ops.forward_train),
    "train_functional": (ops.train_functional,),
    "eval": (ops.eval_op, ops.forward_eval),
    "backward": (ops.backward_op, ops.backward),
    "sync_statistics": (ops.sync_statistics,),
    "sync_combine": (ops.sync_combine,),
    "sync_combine_functional": (ops.sync_combine_functional,),
    "sync_normalize": (ops.sync_normalize,),
    "sync_grad_sums": (ops.sync_grad_sums,),
    "sync_grad_input": (ops.sync_grad_input,),
}
IN_PLACE = ("train", "sync_combine")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class Tally:
    """Counts of calls."""

    allowed: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    spoiled: Counter[str] = field(default_factory=Counter)

    @property
    def calls(self) -> int:
        return self.allowed.total() + self.refused.total()


class Caller:
    """Makes the calls of one round, and checks everything except their values."""

    def __init__(self, rng: random.Random, tally: Tally) -> None:
        self._rng, self._tally = rng, tally

    def __call__(self, name: str, **arguments: Any) -> tuple[Tensor | None, ...]:
        if self._rng.random() < REFUSED_SHARE:
            what, spoiled = spoil(self._rng, arguments, name in IN_PLACE)
            self.refused(name, what, spoiled)
            self._tally.spoiled[what] += 1
        return self._allowed(name, arguments)

    def refused(self, name: str, what: str, arguments: Arguments) -> None:
        entry = self._rng.choice(ENTRY_POINTS[name])
        memory, versions = Memory(arguments), _versions(arguments)
        try:
            entry(*arguments.values())
        except REFUSALS as error:
            message = str(error)
            assert message and "INTERNAL ASSERT" not in message, f"{name}, {what}: {type(error).__name__}: {message}"
        else:
            raise AssertionError(f"{name}, {what}: did not raise")
        assert not memory.changed(), f"{name}, {what}: raised, but has written"
        assert versions == _versions(arguments), f"{name}, {what}: raised, but has bumped a version"
        self._tally.refused[name] += 1

    def _allowed(self, name: str, arguments: Arguments) -> tuple[Tensor | None, ...]:
        entry = self._rng.choice(ENTRY_POINTS[name])
        written = {n: arguments[n] for n in BUFFERS if name in IN_PLACE and arguments[n] is not None}
        memory, versions = Memory(arguments), _versions(arguments)
        with testing.poisoned_allocations() if self._rng.random() < 0.3 else nullcontext():
            results = entry(*arguments.values())
        for argument, version in _versions(arguments).items():
            wrote = argument in written and memory.changed(arguments[argument])
            bumped = version != versions[argument]
            assert bumped if wrote and version is not None else argument in written or not bumped, (
                f"{name}: version of {argument}: {versions[argument]}, now {version}"
            )
        assert not memory.changed_outside(written.values()), f"{name}: wrote elsewhere"
        self._tally.allowed[name] += 1
        return (results,) if isinstance(results, Tensor) else tuple(results)


def _versions(arguments: Arguments) -> dict[str, int | None]:
    tensors = {name: t for name, t in arguments.items() if isinstance(t, Tensor)}
    return {name: None if t.is_inference() else t._version for name, t in tensors.items()}


# Inputs


def draw_shape(rng: random.Random, most: int) -> tuple[int, ...]:
    if rng.random() < 0.1:
        return rng.choice([shape for shape in testing.shapes.QUICK if math.prod(shape) <= most])
    shape = [rng.choice(EXTENTS) for _ in range(rng.randint(2, 5))]
    if rng.random() < 0.05:
        shape[-1] = rng.randint(1000, 5000)
    elif rng.random() < 0.05:  # channel vectors large enough for the heap
        shape = [rng.randint(2, 3), rng.randint(500, 1000)]
    while math.prod(shape) > most:
        largest = max(range(len(shape)), key=lambda d: shape[d])
        shape[largest] = (shape[largest] + 1) // 2
    if math.prod(shape) == shape[1]:
        shape[0] = 2
    return tuple(shape)


def draw_case(rng: random.Random, most: int) -> Case:
    shape = draw_shape(rng, most)
    dtype, parameters = rng.choice(testing.DTYPE_PAIRS)
    layouts = [name for name, layout in testing.LAYOUTS.items() if layout.applies(shape)]
    return Case(
        rng.choice(
            [name for name, distribution in testing.FAMILIES.items() if distribution.fits(testing.DTYPES[dtype])]
        ),
        shape,
        dtype,
        parameters,
        rng.choice(layouts),
        rng.choice(layouts),
        rng.choice(list(testing.GRADS)),
        rng.choice(list(testing.WEIGHTS)),
        rng.random() < 0.6,
        rng.randrange(100),
        rng.choice(testing.EPILOGUES),
    )


def draw_inputs(rng: random.Random, case: Case, device: str) -> Inputs:
    """The inputs of a case, with other settings, and without some of the optional tensors."""
    i = case.inputs(device)
    x = i.x
    if rng.random() < 0.05 and case.elements_per_channel > x.shape[0] > 1:
        x = x[:1].expand(x.shape)
    running = rng.choice(parameter_dtypes(x.dtype))
    mean, var = (t.to(running) if isinstance(t, Tensor) else t for t in (i.running_mean, i.running_var))
    counter: Tensor | None = torch.tensor(rng.choice(COUNTS), device=device).view(rng.choice(((), (1,), (1, 1))))
    momentum, eps = rng.choice(MOMENTA), rng.choice(EPS)
    if case.training and rng.random() < 0.2:
        mean = var = None
    if rng.random() < 0.2 and (momentum is not None or mean is None):
        counter = None
    if not case.training and rng.random() < 0.2:
        eps = 0.0
    elif x.dtype == torch.float64:
        eps = max(eps, LEAST_EPS_OF_FLOAT64)
    return replace(i, x=x, running_mean=mean, running_var=var, num_batches_tracked=counter, momentum=momentum, eps=eps)


def on_cpu(record: Any) -> Any:
    """Inputs, outputs or an epilogue for the reference: tensors on the CPU, vectors flat, no autograd."""

    def moved(name: str, t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        t = t.detach().resolve_neg().cpu()
        return t.clone() if name in ("x", "grad", "residual", "y", "dx") else t.reshape(-1).clone()

    fields = {name: moved(name, value) for name, value in vars(record).items()}
    if fields.get("num_batches_tracked") is not None:
        fields["num_batches_tracked"] = fields["num_batches_tracked"].reshape(())
    elif "momentum" in fields and fields["momentum"] is None:
        fields["momentum"] = 0.0  # without running statistics
    return replace(record, **fields)


def arranged(rng: random.Random, i: Inputs) -> Inputs:
    mean, var = arrange_running(rng, i.running_mean, i.running_var)
    return replace(
        i,
        x=arrange_data(rng, i.x),
        grad=arrange_data(rng, i.grad),
        weight=arrange_read(rng, i.weight),
        bias=arrange_read(rng, i.bias),
        running_mean=mean,
        running_var=var,
        num_batches_tracked=i.num_batches_tracked if i.num_batches_tracked is None else i.num_batches_tracked.clone(),
    )


# Rounds


def fuzz_call(rng: random.Random, call: Caller, case: Case, given: Inputs) -> None:
    """A forward and its backward, in training or inference, with or without an epilogue."""
    i = arranged(rng, given)
    epilogue = testing.make_epilogue(case.epilogue, given)
    residual = None if epilogue.residual is None else arrange_data(rng, epilogue.residual)
    named, functional = not epilogue.is_empty or rng.random() < 0.3, rng.random() < 0.3
    head: Arguments = {"x": i.x, "weight": i.weight, "bias": i.bias}
    tail: Arguments = {"eps": i.eps, **({"residual": residual, "relu": epilogue.relu} if named else {})}
    running: Arguments = {"running_mean": i.running_mean, "running_var": i.running_var}
    if i.training:
        name = f"train{'_functional' * functional}"
        counted: Arguments = {"num_batches_tracked": i.num_batches_tracked, "momentum": i.momentum}
        results = call(name, **head, **running, **counted, **tail)
        buffers = results[-3:] if functional else (i.running_mean, i.running_var, i.num_batches_tracked)
        after = {n: t if getattr(i, n) is not None else None for n, t in zip(BUFFERS, buffers)}
    else:
        results, after = call("eval", **head, **running, **tail), {}
    y, mean, invstd = results[:3]
    assert y is not None and mean is not None and invstd is not None
    saved = {"mean": arrange_read(rng, mean), "invstd": arrange_read(rng, invstd)}
    needs = {f"need_{n}": rng.random() < 0.8 for n in ("input", "weight", "bias")}
    gradient: Arguments = {"grad": i.grad, "x": i.x, "weight": i.weight, **saved}
    if epilogue.has_bounds:
        grads = call("backward", **gradient, training=i.training, **needs, relu_bounds=results[3])
        assert results[3] is not None
        low, high = results[3].cpu()
        testing.assert_bounds_are_exact(on_cpu(given), y.cpu(), low, high, case)
    else:
        grads = call("backward", **gradient, training=i.training, **needs)
    wanted = (needs["need_input"], needs["need_weight"] and i.weight is not None, needs["need_bias"])
    assert all(want or g is None or g.numel() == 0 for g, want in zip(grads, wanted)), f"{case}: not requested"
    made = [g if want else None for g, want in zip(grads, wanted)]
    outputs = Outputs(y=y, mean=mean, invstd=invstd, **after, **dict(zip(("dx", "dweight", "dbias"), made)))
    if epilogue.is_empty:
        error_reports = testing.judge_call(on_cpu(given), on_cpu(outputs))
    else:
        error_reports = testing.judge_fused(on_cpu(given), on_cpu(epilogue), on_cpu(outputs))
    assert_within(error_reports, str(case))


def fuzz_ranks(rng: random.Random, call: Caller, case: Case, given: Inputs) -> None:
    """The steps of a batch on one to four ranks, some of them without data."""
    i = arranged(rng, given)
    n = i.x.shape[0]
    bounds = [0, *sorted(rng.randint(0, n) for _ in range(rng.randrange(4))), n]
    parts = [(i.x.detach()[a:b], i.grad.detach()[a:b]) for a, b in pairwise(bounds)]
    rows = torch.stack([_only(call("sync_statistics", x=x, eps=i.eps)) for x, _ in parts])
    combine = rng.choice(("sync_combine", "sync_combine_functional"))
    buffers: Arguments = {n: getattr(i, n) for n in BUFFERS}
    combined = call(combine, rows=rows, **buffers, momentum=i.momentum, eps=i.eps, dtype=i.x.dtype)
    mean, invstd, count = combined[:3]
    if combine != "sync_combine":
        buffers = {n: t if buffers[n] is not None else None for n, t in zip(BUFFERS, combined[3:])}
    saved: Arguments = {"mean": mean, "invstd": invstd}
    needs: Arguments = {"need_weight": rng.random() < 0.8, "need_bias": rng.random() < 0.8}
    y = [_only(call("sync_normalize", x=x, weight=i.weight, bias=i.bias, **saved)) for x, _ in parts]
    sums = [call("sync_grad_sums", grad=g, x=x, weight=i.weight, **saved, **needs) for x, g in parts]
    exchanged = torch.stack([_only(s[:1]) for s in sums])
    rest: Arguments = {"weight": i.weight, **saved, "rows": exchanged, "count": count}
    dx = [_only(call("sync_grad_input", grad=g, x=x, **rest)) for x, g in parts]
    assert mean is not None
    dbias, dweight = exchanged.sum(0).to(mean.dtype).view(2, -1)
    outputs = Outputs(torch.cat(y), mean, invstd, **buffers, dx=torch.cat(dx), dweight=dweight, dbias=dbias)
    assert_within(testing.judge_call(on_cpu(given), on_cpu(outputs)), f"{case} {bounds}")


def _only(results: tuple[Tensor | None, ...]) -> Tensor:
    (result,) = results
    assert result is not None
    return result


def fuzz_degenerate(rng: random.Random, call: Caller, case: Case, given: Inputs) -> None:
    """No elements, or one per channel: edge cases with almost nothing to compute."""
    i = arranged(rng, given)
    empty = rng.random() < 0.6
    x = torch.ones([1 if d != 1 else s for d, s in enumerate(case.shape)], dtype=i.x.dtype, device=i.x.device)
    if empty:
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [0 if d == rng.choice(dims) else s for d, s in enumerate(case.shape)]
        if 0 not in shape:
            shape[0] = 0
        x = x.new_ones(shape)
    vectors: Arguments = {"weight": i.weight, "bias": i.bias}
    running: Arguments = {"running_mean": i.running_mean, "running_var": i.running_var}
    counted: Arguments = {"num_batches_tracked": i.num_batches_tracked, "momentum": i.momentum}
    name = rng.choice(("train", "train_functional"))
    mean, invstd = (x.new_ones(x.shape[1], dtype=testing.tolerance.accumulate_dtype(x.dtype)) for _ in range(2))
    arguments: Arguments = {"x": x, **vectors, **running, **counted, "eps": i.eps or 1e-5}
    if not empty:
        call.refused(name, "one value per channel", arguments)
    else:
        before = {n: None if t is None else t.clone() for n, t in (running | counted).items() if n in BUFFERS}
        results = call(name, **arguments)
        after = dict(zip(BUFFERS, results[4:])) if name != "train" else arguments
        assert results[0] is not None and results[0].shape == x.shape
        for n in ("running_mean", "running_var"):
            assert before[n] is None or same_bits(after[n], before[n]), f"{name} of {tuple(x.shape)}: {n} has changed"
        counter = before["num_batches_tracked"]
        assert counter is None or same_bits(after["num_batches_tracked"], counter + 1)
    if i.running_mean is not None:
        y = call("eval", x=x, **vectors, **running, eps=i.eps)[0]
        assert y is not None and y.shape == x.shape and y.dtype == x.dtype
    training = empty and rng.random() < 0.5
    needs = dict.fromkeys(("need_input", "need_weight", "need_bias"), True)
    grads = call("backward", grad=x, x=x, weight=i.weight, mean=mean, invstd=invstd, training=training, **needs)
    assert grads[0] is not None and grads[0].shape == x.shape
    assert not empty or all(g is None or not g.any() for g in grads[1:])


def run_round(seed: int, tally: Tally, device: str = "cpu", most: int = 2000) -> None:
    """One round. Raises AssertionError, or an unexpected exception of a call."""
    rng = random.Random(seed)
    case = draw_case(rng, most * LARGER if rng.random() < LARGER_SHARE else most)
    kind = rng.random()
    if kind < 0.2:
        case = replace(case, training=True, epilogue="")
    given = draw_inputs(rng, case, device)
    fuzz = fuzz_ranks if kind < 0.2 else fuzz_degenerate if kind < 0.3 else fuzz_call
    fuzz(rng, Caller(rng, tally), case, given)


def run(first: int, count: int, device: str = "cpu", calls: int | None = None, most: int = 2000) -> Tally:
    """Rounds first, first + 1 and so on: `count` rounds, or until `calls` calls were made."""
    tally, seed, started = Tally(), first, time.monotonic()
    while seed < first + count if calls is None else tally.calls < calls:
        try:
            run_round(seed, tally, device, most)
        except BaseException as error:
            print(f"in round {seed}: {type(error).__name__}", file=sys.stderr)
            raise
        seed += 1
        if calls is not None and (seed - first) % 1000 == 0:
            print(f"{seed - first} rounds, {tally.calls} calls, {time.monotonic() - started:.0f} s", flush=True)
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(description="Makes random calls of every op and checks their results and effects.")
    parse.add_argument("--first", type=int, default=0, metavar="SEED")
    parse.add_argument("--count", type=int, default=1000, metavar="ROUNDS")
    parse.add_argument("--calls", type=int, help="run until this many calls were made, instead of --count rounds")
    parse.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parse.add_argument("--most", type=int, default=2000, metavar="ELEMENTS", help="maximum size of an input")
    parse.add_argument("--threads", type=int, default=1)
    options = parse.parse_args(arguments)
    torch.set_num_threads(options.threads)
    tally = run(options.first, options.count, options.device, options.calls, options.most)
    print(f"{tally.calls} calls, {tally.refused.total()} of them invalid, in {len(tally.spoiled)} ways")
    for name in ENTRY_POINTS:
        print(f"{tally.allowed[name]:7d} valid {tally.refused[name]:6d} invalid  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
