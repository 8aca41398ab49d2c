"""Random sequences of operations on a layer, against nn.BatchNorm in float64: the public API as used over time.

The layer may have any dtype. The torch layer copies its state before each call, so that each comparison covers one
call and no accumulated rounding.

"""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bnkernels as bnk
from bnkernels.testing import same_bits

LAYERS: dict[int, tuple[Any, Any]] = {
    2: (bnk.BatchNorm1d, nn.BatchNorm1d),
    3: (bnk.BatchNorm1d, nn.BatchNorm1d),
    4: (bnk.BatchNorm2d, nn.BatchNorm2d),
    5: (bnk.BatchNorm3d, nn.BatchNorm3d),
}
# Relative to the largest value. Inputs are well scaled; test_numerics.py has adversarial ones.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}
# A parameter instead of the fixture `device`: hypothesis does not reset function-scoped fixtures between examples.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


class Pair:
    """A layer of this package, and torch's in float64."""

    def __init__(self, rng: random.Random, dims: int, options: dict[str, Any], device: str) -> None:
        self.rng, self.dims, self.options, self.device = rng, dims, options, device
        self.channels = rng.randint(1, 7)
        ours, torch_class = LAYERS[dims]
        self.ours = ours(self.channels, **options).to(device)
        self.torch_layer = torch_class(self.channels, **options).double()

    @property
    def dtype(self) -> torch.dtype:
        held = [t for t in self.ours.state_dict().values() if t.is_floating_point()]
        return held[0].dtype if held else self._data

    _data = torch.float32

    def sync(self) -> None:
        """Copy state and settings to torch's layer."""
        ours = self.ours.state_dict()
        for name, t in self.torch_layer.state_dict().items():
            t.copy_(ours[name])
        self.torch_layer.train(self.ours.training)
        self.torch_layer.momentum, self.torch_layer.eps = self.ours.momentum, self.ours.eps
        self.torch_layer.track_running_stats = self.ours.track_running_stats
        for parameter, torch_parameter in zip(self.ours.parameters(), self.torch_layer.parameters()):
            torch_parameter.requires_grad_(parameter.requires_grad)
            torch_parameter.grad = None if parameter.grad is None else parameter.grad.cpu().double()

    def draw(self) -> tuple[Tensor, Tensor]:
        """An input with random strides, and its float64 copy for torch. At least 4 samples: with two values per
        channel, the gradient is only rounding."""
        shape = (self.rng.randint(4, 7), self.channels, *(self.rng.randint(1, 5) for _ in range(self.dims - 2)))
        x = (torch.randn(shape) * 2 + 1).to(self.dtype)
        if self.dims > 3 and self.rng.random() < 0.4:
            x = x.contiguous(memory_format=(torch.channels_last, torch.channels_last_3d)[self.dims - 4])
        elif self.rng.random() < 0.3:
            x = torch.cat((x, x), -1)[..., ::2]
        return x.to(self.device), x.cpu().double()

    def close(self, name: str, got: Tensor | None, expected: Tensor | None) -> None:
        assert (got is None) == (expected is None), name
        if got is None or expected is None:
            return
        if not got.is_floating_point():
            assert torch.equal(got.cpu(), expected), f"{name}: {got}, torch has {expected}"
            return
        tolerance = TOLERANCE[self.dtype]
        bound = tolerance * (1 + expected.abs().max().item() if expected.numel() else 1)
        torch.testing.assert_close(got.detach().cpu().double(), expected.detach(), rtol=tolerance, atol=bound, msg=name)

    def same_state(self) -> None:
        ours, expected = self.ours.state_dict(), self.torch_layer.state_dict()
        assert list(ours) == list(expected)
        for name, t in ours.items():
            self.close(name, t, expected[name])


# Actions on a pair


def step(pair: Pair) -> None:
    """A forward with or without a residual and, mostly, its backward."""
    pair.sync()
    x, x_torch = (t.requires_grad_() for t in pair.draw())
    residual = torch.randn_like(x) if pair.rng.random() < 0.3 else None
    y = pair.ours(x) if residual is None else pair.ours(x, residual)
    expected = pair.torch_layer(x_torch)
    expected = expected if residual is None else expected + residual.cpu().double()
    assert y.dtype == x.dtype and y.shape == x.shape
    pair.close("y", y, expected)
    pair.same_state()
    if pair.rng.random() < 0.8:
        grad = torch.randn_like(y)
        y.backward(grad)
        expected.backward(grad.cpu().double())
        pair.close("grad of x", x.grad, x_torch.grad)
        for (name, parameter), torch_parameter in zip(pair.ours.named_parameters(), pair.torch_layer.parameters()):
            pair.close(f"grad of {name}", parameter.grad, torch_parameter.grad)


def without_grad(pair: Pair) -> None:
    pair.sync()
    x, x_torch = pair.draw()
    with pair.rng.choice((torch.no_grad, torch.inference_mode))():
        y = pair.ours(x)
    expected = pair.torch_layer(x_torch)
    pair.close("y", y, expected)
    pair.same_state()


def function(pair: Pair) -> None:
    """batch_norm() on the layer's tensors."""
    pair.sync()
    x, x_torch = pair.draw()
    training = pair.rng.random() < 0.5 or pair.ours.running_mean is None
    momentum = pair.ours.momentum or 0.0
    layers = (pair.ours, pair.torch_layer)
    tensors = [(layer.running_mean, layer.running_var, layer.weight, layer.bias) for layer in layers]
    y = bnk.batch_norm(x, *tensors[0], training, momentum, pair.ours.eps)
    pair.close("y", y, F.batch_norm(x_torch, *tensors[1], training, momentum, pair.ours.eps))
    pair.same_state()


def without_update(pair: Pair) -> None:
    """no_statistics_update leaves the bits of the buffers unchanged."""
    before = {name: t.clone() for name, t in pair.ours.state_dict().items()}
    with bnk.no_statistics_update(pair.ours):
        pair.ours(pair.draw()[0])
    assert all(same_bits(t, before[name]) for name, t in pair.ours.state_dict().items())


def wrong_channels(pair: Pair) -> None:
    """An input with one channel too many raises, as in torch, and changes nothing (torch counts the batch)."""
    pair.sync()
    before = {name: t.clone() for name, t in pair.ours.state_dict().items()}
    averages = pair.ours.running_mean is not None and (pair.ours.track_running_stats or not pair.ours.training)
    if pair.ours.weight is None and not averages:
        return  # no tensor constrains the number of channels
    x = torch.randn((3, pair.channels + 1, *(2,) * (pair.dims - 2)), dtype=pair.dtype, device=pair.device)
    for layer, data in ((pair.ours, x), (copy.deepcopy(pair.torch_layer), x.cpu().double())):
        with pytest.raises(RuntimeError, match="should contain"):
            layer(data)
    assert all(same_bits(t, before[name]) for name, t in pair.ours.state_dict().items())


def fresh(pair: Pair) -> Any:
    layer = LAYERS[pair.dims][0](pair.channels, **pair.options)
    layer = layer.to(pair.device, pair.dtype).train(pair.ours.training)
    layer.momentum, layer.eps = pair.ours.momentum, pair.ours.eps
    layer.track_running_stats = pair.ours.track_running_stats
    return layer


def load_state_dict(pair: Pair) -> None:
    """Through a file into a new layer, with no missing or unexpected keys."""
    file = io.BytesIO()
    torch.save(pair.ours.state_dict(), file)
    file.seek(0)
    layer = fresh(pair)
    layer.load_state_dict(torch.load(file, weights_only=True))
    replaced(pair, layer)


def replaced(pair: Pair, layer: Any) -> None:
    """Replace the layer by one of the same state and class that shares no memory with it."""
    old, new = pair.ours.state_dict(), layer.state_dict()
    assert list(old) == list(new) and type(layer) is type(pair.ours) and repr(layer) == repr(pair.ours)
    for name, t in old.items():
        assert same_bits(new[name], t) and (t.data_ptr() != new[name].data_ptr()), name
    assert layer.training == pair.ours.training
    pair.ours = layer


def revert_and_convert(pair: Pair) -> None:
    """revert() and convert() restore the class and leave object and tensors."""
    holder = nn.Sequential(pair.ours)
    state = {name: t.data_ptr() for name, t in pair.ours.state_dict().items()}
    assert type(bnk.revert(holder)[0]) is LAYERS[pair.dims][1]
    assert bnk.convert(holder)[0] is pair.ours and type(pair.ours) is LAYERS[pair.dims][0]
    assert {name: t.data_ptr() for name, t in pair.ours.state_dict().items()} == state


def to_dtype(pair: Pair) -> None:
    pair._data = pair.rng.choice(list(TOLERANCE))
    pair.ours.to(pair._data)
    assert all(t.dtype == pair._data for t in pair.ours.state_dict().values() if t.is_floating_point())


def sgd_step(pair: Pair) -> None:
    """One step of SGD."""
    with torch.no_grad():
        for parameter in pair.ours.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad / (1 + parameter.grad.norm())


def freeze(pair: Pair) -> None:
    for parameter in pair.ours.parameters():
        parameter.requires_grad_(not parameter.requires_grad)


def set_momentum(pair: Pair) -> None:
    pair.ours.momentum = pair.rng.choice((None, 0.0, 0.1, 0.7, 1.0))


def toggle_tracking(pair: Pair) -> None:
    """Only for layers with running statistics: torch's reset_running_stats() fails on others."""
    if pair.options["track_running_stats"]:
        pair.ours.track_running_stats = not pair.ours.track_running_stats


def set_eps(pair: Pair) -> None:
    pair.ours.eps = pair.rng.choice((1e-5, 1e-3, 0.5))


ACTIONS: tuple[Callable[[Pair], Any], ...] = (
    step,
    step,
    step,
    step,
    without_grad,
    function,
    without_update,
    wrong_channels,
    load_state_dict,
    revert_and_convert,
    to_dtype,
    sgd_step,
    freeze,
    set_momentum,
    toggle_tracking,
    set_eps,
    lambda pair: pair.ours.train(),
    lambda pair: pair.ours.eval(),
    lambda pair: replaced(pair, copy.deepcopy(pair.ours)),
    lambda pair: replaced(pair, pickle.loads(pickle.dumps(pair.ours))),
    lambda pair: pair.ours.reset_running_stats(),
    lambda pair: pair.ours.reset_parameters(),
    lambda pair: pair.ours.zero_grad(),
)


@pytest.mark.parametrize("where", DEVICES)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    dims=st.sampled_from(list(LAYERS)),
    options=st.fixed_dictionaries(
        {"affine": st.booleans(), "track_running_stats": st.booleans(), "momentum": st.sampled_from((0.1, None))}
    ),
    actions=st.lists(st.sampled_from(range(len(ACTIONS))), min_size=4, max_size=16),
    seed=st.integers(0, 99),
)
def test_action_sequences(where: str, dims: int, options: dict[str, Any], actions: list[int], seed: int) -> None:
    """After any sequence of actions, the next call and the state after it match nn.BatchNorm."""
    torch.manual_seed(seed)
    pair = Pair(random.Random(seed), dims, options, where)
    for action in (*actions, 0):
        ACTIONS[action](pair)
