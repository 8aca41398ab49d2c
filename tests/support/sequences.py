"""Random sequences of BatchNorm calls on one device: state that one launch leaves for the next.

A sequence draws layers (shape, dtype, layout, epilogue, momentum, including None), binds each to one of several streams
or to a CUDA graph, and calls them in random order, each many times. Checked at every synchronization point:

    results       a layer's first results are within tolerance of the float64 reference, later ones have the same bits
    statistics    running_mean, running_var and num_batches_tracked equal those after the same number of batches
    workspace     every word of the barrier workspace has its value at rest (csrc/cuda/launch/barrier_workspace.h)

    python tests/support/sequences.py --first 0 --count 50        on a GPU
    PYTHONPATH=.:tests/support python -m fake_cuda tests/support/sequences.py --count 50

Prints the number of sequences and calls, and the number of calls per kind of plan. Exit code 1: a check failed;
the seed is printed.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from plan_kinds import KINDS, kind
from plan_model import TRAINING
from torch import Tensor

from bnkernels import _ops as ops
from bnkernels.explain.devices import Limits
from bnkernels.functional import batch_norm_tracked
from bnkernels.testing import (
    EPILOGUES,
    LAYOUTS,
    Case,
    Inputs,
    Outputs,
    assert_within,
    judge_fused_call,
    make_epilogue,
    same_bits,
)

CHANNELS = (1, 2, 3, 5, 8, 16, 33, 64, 100, 128)
SPATIAL = ((), (9,), (4, 4), (31,), (7, 7), (8, 8), (14, 14), (28, 28), (2, 5, 5))
DTYPES = (("float64", "float64"), ("float32", "float32"), ("float16", "float32"), ("bfloat16", "float32"))
LAYOUT_NAMES = ("contiguous", "contiguous", "channels_last", "offset", "channels_last_offset")
MAX_ELEMENTS = 40_000
STREAMS = 3


@dataclass
class Layer:
    """One BatchNorm, its fixed input, and its expected results so far."""

    case: Case
    momentum: float | None
    backward: bool
    inputs: Inputs
    calls: int = 0
    first: dict[str, Tensor] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        i = self.inputs
        assert i.running_mean is not None and i.running_var is not None and i.num_batches_tracked is not None
        self.start = (i.running_mean, i.running_var, i.num_batches_tracked)
        self.statistics = tuple(tensor.clone() for tensor in self.start)
        self.epilogue = make_epilogue(self.case.epilogue, i)

    def call(self) -> dict[str, Tensor]:
        """A training forward and, for layers with one, the backward."""
        i, epilogue = self.inputs, self.epilogue
        names = ("dx", "dweight", "dbias", "dresidual")
        leaves = {
            name: tensor.detach().requires_grad_(self.backward)
            for name, tensor in zip(names, (i.x, i.weight, i.bias, epilogue.residual))
            if tensor is not None
        }
        x, weight, bias, residual = (leaves.get(name) for name in names)
        assert x is not None
        args = (x, weight, bias, *self.statistics, True, self.momentum, i.eps)
        y = batch_norm_tracked(*args, residual, "relu" if epilogue.relu else None)
        results = {"y": y.detach()}
        if self.backward:
            results |= zip(leaves, torch.autograd.grad(y, list(leaves.values()), i.grad))
        return results

    def ran(self, results: dict[str, Tensor], times: int = 1) -> None:
        self.calls += times
        self.last = results

    def check(self) -> None:
        """Precondition: the device has finished all work."""
        if not self.last:
            return
        if not self.first:
            self.first = {name: tensor.clone() for name, tensor in self.last.items()}
            judged = {name: tensor.cpu() for name, tensor in self.first.items() if name != "dresidual"}
            inputs = self.case.inputs()
            epilogue = make_epilogue(self.case.epilogue, inputs)
            assert_within(judge_fused_call(inputs, epilogue, Outputs(**judged)), str(self.case))
        for name, tensor in self.last.items():
            assert same_bits(tensor, self.first[name]), f"{self.case}: {name} has other bits than in the first call"
        self._check_statistics()

    def _check_statistics(self) -> None:
        mean, var, count = (tensor.cpu() for tensor in self.statistics)
        start_mean, start_var, start_count = (tensor.cpu() for tensor in self.start)
        assert count.item() == start_count.item() + self.calls, (
            f"{self.case}: num_batches_tracked is {count.item()} after {self.calls} calls from {start_count.item()}"
        )
        rows = self.case.inputs().x.double().transpose(0, 1).flatten(1)
        for name, got, start, batch in (
            ("running_mean", mean, start_mean, rows.mean(1)),
            ("running_var", var, start_var, rows.var(1)),
        ):
            expected = start.double()
            for number in range(1, self.calls + 1):
                factor = 1 / (int(start_count) + number) if self.momentum is None else self.momentum
                expected = expected + factor * (batch - expected)
            torch.testing.assert_close(
                got.double(), expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{self.case} {name}: {text}"
            )


class Graph:
    """Layers captured together, in one stream or in two that fork and join."""

    def __init__(self, layers: list[Layer], forked: bool) -> None:
        self.layers = layers
        self.graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        # One-time initialization per kernel and device happens before the capture.
        for layer in layers:
            layer.ran(layer.call())
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            current = torch.cuda.current_stream()
            self.results = []
            if forked:
                side.wait_stream(current)
            for number, layer in enumerate(layers):
                with torch.cuda.stream(side if forked and number % 2 else current):
                    self.results.append(layer.call())
            if forked:
                current.wait_stream(side)

    def replay(self, times: int) -> None:
        for _ in range(times):
            self.graph.replay()
        for layer, results in zip(self.layers, self.results):
            layer.ran(results, times)


@dataclass
class Tally:
    """Counts over the sequences."""

    sequences: int = 0
    calls: int = 0
    kinds: Counter[str] = field(default_factory=Counter)


def draw_case(rng: random.Random, large: bool, limits: Limits) -> Case:
    if large:
        return replace(rng.choice(list(KINDS)), epilogue=rng.choice(EPILOGUES))
    # Few shapes of this size use a grid-level barrier, whose words outlive the launch; every third case must.
    tries = 40 if rng.random() < 1 / 3 else 1
    for _ in range(tries):
        case = _draw_small_case(rng)
        if any("grid" in kind(case, pass_, limits) for pass_ in TRAINING):
            break
    return case


def _draw_small_case(rng: random.Random) -> Case:
    while True:
        channels, spatial = rng.choice(CHANNELS), rng.choice(SPATIAL)
        most = MAX_ELEMENTS // (channels * torch.Size(spatial).numel())
        batch = int(2 ** rng.uniform(0, 13))
        shape = (batch, channels, *spatial)
        layout = rng.choice(LAYOUT_NAMES)
        if batch > most or torch.Size(shape).numel() < 2 * channels or not LAYOUTS[layout].applies(shape):
            continue
        dtype, parameters = rng.choice(DTYPES)
        return Case("normal", shape, dtype, parameters, layout, seed=rng.randrange(100), epilogue=rng.choice(EPILOGUES))


def draw_layer(rng: random.Random, large: bool, limits: Limits) -> Layer:
    case = draw_case(rng, large, limits)
    momentum = rng.choice((0.1, 0.1, None))
    return Layer(case, momentum, rng.random() < 0.6, case.inputs("cuda"))


def check_workspace() -> None:
    for words in ops.barrier_workspace(torch.cuda.current_device()):
        # A group's word is 0 except for its top bit, which alternates; a launch's word is 0.
        values = words.cpu()
        launch, groups = values[:, 0], values[:, 1:]
        assert not launch.any(), f"launch words are left at {launch.unique().tolist()}"
        assert not (groups & 0x7FFFFFFF).any(), f"group words are left at {groups.unique().tolist()}"


def run_sequence(seed: int, tally: Tally, large: bool = False) -> None:
    """One sequence. Raises AssertionError, or the device's error."""
    rng = random.Random(seed)
    limits = Limits(**ops.device_limits(torch.cuda.current_device()))
    streams = [torch.cuda.default_stream(), *(torch.cuda.Stream() for _ in range(STREAMS - 1))]
    layers = [draw_layer(rng, large, limits) for _ in range(rng.randint(2, 5))]
    bound = [rng.choice(streams) for _ in layers]
    graphs: list[tuple[Graph, torch.cuda.Stream]] = []
    all_layers = list(layers)
    # Some sequences check after every step; in others the streams run as long as possible without synchronization.
    check_probability = rng.choice((1.0, 0.3, 0.0))
    torch.cuda.synchronize()

    def check() -> None:
        torch.cuda.synchronize()
        for layer in all_layers:
            layer.check()
        check_workspace()

    for _ in range(rng.randint(6, 14)):
        action = rng.random()
        if action < 0.1:
            check()
            graph = Graph([draw_layer(rng, large, limits) for _ in range(rng.randint(1, 3))], rng.random() < 0.5)
            all_layers += graph.layers
            graphs.append((graph, rng.choice(streams)))
            torch.cuda.synchronize()
        elif action < 0.35 and graphs:
            graph, stream = rng.choice(graphs)
            with torch.cuda.stream(stream):
                graph.replay(rng.randint(1, 3))
        elif action < 0.4 and graphs:
            graphs.pop(rng.randrange(len(graphs)))
        else:
            number = rng.randrange(len(layers))
            with torch.cuda.stream(bound[number]):
                for _ in range(rng.randint(1, 3)):
                    layers[number].ran(layers[number].call())
        if rng.random() < check_probability:
            check()
    check()
    tally.sequences += 1
    for layer in all_layers:
        tally.calls += layer.calls
        cumulative = " cumulative" * (layer.momentum is None)
        for pass_ in TRAINING[: 1 + layer.backward]:
            tally.kinds[kind(layer.case, pass_, limits) + cumulative * (pass_ == TRAINING[0])] += layer.calls


def run(first: int, count: int, large: bool = False) -> Tally:
    tally = Tally()
    for seed in range(first, first + count):
        try:
            run_sequence(seed, tally, large)
        except BaseException as error:
            print(f"in sequence {seed}: {type(error).__name__}", file=sys.stderr)
            raise
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(description="Runs random sequences of BatchNorm calls and checks their results.")
    parse.add_argument("--first", type=int, default=0, metavar="SEED")
    parse.add_argument("--count", type=int, default=50)
    parse.add_argument("--large", action="store_true", help="layers of realistic size")
    options = parse.parse_args(arguments)
    tally = run(options.first, options.count, options.large)
    print(f"{tally.sequences} sequences, {tally.calls} calls")
    for name, count in sorted(tally.kinds.items()):
        print(f"{count:6d} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
