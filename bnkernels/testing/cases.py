"""Cases: one call of BatchNorm with inputs that its name alone reproduces, and the grids that tests and check run.

A name is seven fields joined by "/", or eight:

    family / shape / dtype[+parameters'] / layout[+gradient's] / gradient / weight / train|eval[+seed] [/ epilogue]
    offset_1e4/8x64x14x14/float16+float32/channels_last/xhat/normal/train
    normal/4x3x5x7/float32/contiguous/normal/normal/eval/add+relu

Values depend on family, shape, seed and the distributions of gradient and weight; dtype only rounds them and layout
only moves them, so cases that differ in nothing else hold the same numbers.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .. import reference
from . import shapes
from .calls import Inputs
from .distributions import FAMILIES, GRADS, WEIGHTS
from .epilogue import EPILOGUES
from .layouts import LAYOUTS, lay_out, misaligned
from .shapes import Shape

TIERS = ("quick", "full", "huge")
EPS = 1e-5
MOMENTUM = 0.1

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# (x, parameters and running statistics)
DTYPE_PAIRS: tuple[tuple[str, str], ...] = (
    ("float64", "float64"),
    ("float32", "float32"),
    ("float16", "float16"),
    ("float16", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
)


@dataclass(frozen=True)
class Case:
    """One call, by the names of its parts. Raises ValueError for a name that is not known or does not fit."""

    distribution: str
    shape: Shape
    dtype: str = "float32"
    parameters: str = ""
    layout: str = "contiguous"
    grad_layout: str = ""
    grad: str = "normal"
    weight: str = "normal"
    training: bool = True
    seed: int = 0
    epilogue: str = ""
    """What follows in the same kernel (EPILOGUES). Only fused_cases() have one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", self.parameters or self.dtype)
        object.__setattr__(self, "grad_layout", self.grad_layout or self.layout)
        for field, value, known in (
            ("distribution", self.distribution, FAMILIES),
            ("dtype", self.dtype, DTYPES),
            ("dtype", self.parameters, DTYPES),
            ("layout", self.layout, LAYOUTS),
            ("layout", self.grad_layout, LAYOUTS),
            ("gradient", self.grad, GRADS),
            ("weight", self.weight, WEIGHTS),
            ("epilogue", self.epilogue, EPILOGUES),
        ):
            if value not in known:
                raise ValueError(f"no {field} {value!r}; there are: {', '.join(filter(None, known))}")
        if len(self.shape) < 2 or min(self.shape) < 1 or self.elements_per_channel < 2:
            raise ValueError(f"shape {self.shape}: expected (N, C, *) with 2 or more values per channel")
        if (self.dtype, self.parameters) not in DTYPE_PAIRS:
            raise ValueError(f"{self.parameters} parameters do not go with {self.dtype} data")
        if not FAMILIES[self.distribution].fits(DTYPES[self.dtype]):
            raise ValueError(f"{self.dtype} cannot hold the values of {self.distribution}")
        for layout in (self.layout, self.grad_layout):
            if not LAYOUTS[layout].applies(self.shape):
                raise ValueError(f"layout {layout} means nothing for shape {self.shape}")

    @property
    def elements_per_channel(self) -> int:
        return math.prod(self.shape) // self.shape[1]

    def __str__(self) -> str:
        return "/".join(
            (
                self.distribution,
                "x".join(map(str, self.shape)),
                self.dtype if self.parameters == self.dtype else f"{self.dtype}+{self.parameters}",
                self.layout if self.grad_layout == self.layout else f"{self.layout}+{self.grad_layout}",
                self.grad,
                self.weight,
                ("train" if self.training else "eval") + (f"+{self.seed}" if self.seed else ""),
                *((self.epilogue,) if self.epilogue else ()),
            )
        )

    @staticmethod
    def parse(name: str) -> Case:
        """The inverse of str(case). Raises ValueError."""
        fields = name.strip().split("/")
        if len(fields) not in (7, 8):
            expected = "family/shape/dtype/layout/gradient/weight/train|eval[/epilogue]"
            raise ValueError(f"a case is {expected}; {name!r} has {len(fields)} fields, not 7 or 8")
        distribution, shape, dtype, layout, grad, weight, mode = fields[:7]
        epilogue = "".join(fields[7:])
        dtype, _, parameters = dtype.partition("+")
        layout, _, grad_layout = layout.partition("+")
        mode, _, seed = mode.partition("+")
        if mode not in ("train", "eval"):
            raise ValueError(f"expected train or eval, got {mode!r}")
        try:
            sizes = tuple(int(s) for s in shape.split("x"))
            number = int(seed or 0)
        except ValueError:
            raise ValueError(f"shape or seed is no number in {name!r}") from None
        return Case(
            *(
                distribution,
                sizes,
                dtype,
                parameters,
                layout,
                grad_layout,
                grad,
                weight,
                mode == "train",
                number,
                epilogue,
            )
        )

    def inputs(self, device: torch.device | str = "cpu") -> Inputs:
        """The tensors of this case on `device`, each call anew; equal bits every time."""
        dtype, parameters = DTYPES[self.dtype], DTYPES[self.parameters]
        x, grad = self._activations(dtype)
        channels = self.shape[1]
        generator = _generator(self.seed, "parameters", self.weight, str(channels))
        z = torch.randn(3, channels, generator=generator, dtype=torch.float64)
        weight, bias = WEIGHTS[self.weight](z[0], z[1])
        if self.training:
            mean, var = z[2], z[2].abs() + 0.5
        else:
            # As after training on such data: near the batch's statistics, but not equal to them.
            mean, var = _finite_statistics(x)
            mean, var = mean + 0.1 * var.sqrt() * z[2], var * (1 + 0.2 * z[2].tanh())

        def vector(t: Tensor | None) -> Tensor | None:
            return None if t is None else self._vector(_round(t, parameters).to(device))

        laid_out = grad.to(device)
        if self.grad == "expanded":
            laid_out = laid_out[:1, :1, ...].reshape(-1)[0].expand(self.shape)
        elif self.grad == "pooled" and len(self.shape) > 2:
            laid_out = laid_out.flatten(2)[:, :, 0].reshape(*self.shape[:2], *(1,) * (len(self.shape) - 2))
            laid_out = laid_out.expand(self.shape)
        else:
            laid_out = lay_out(laid_out, self.grad_layout)
        return Inputs(
            x=lay_out(x.to(device), self.layout),
            grad=laid_out,
            weight=vector(weight),
            bias=vector(bias),
            running_mean=vector(mean),
            running_var=vector(var),
            num_batches_tracked=torch.tensor(4, dtype=torch.int64, device=device),
            training=self.training,
            momentum=MOMENTUM,
            eps=EPS,
        )

    def _vector(self, t: Tensor) -> Tensor:
        return misaligned(t) if "offset" in self.layout else t

    def _activations(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x and its gradient, contiguous (N, C, *), made in blocks of channels so that float64 copies stay small."""
        channels, n = self.shape[1], self.elements_per_channel
        x = torch.empty(channels, n, dtype=dtype)
        grad = torch.empty(channels, n, dtype=dtype)
        step = max(1, (1 << 22) // n)
        # A family sees a block as the whole: one_nan and first_1e5 happen once in each.
        for start in range(0, channels, step):
            stop = min(start + step, channels)
            block = (self.distribution, str(self.shape), str(start))
            z = _normal(stop - start, n, _generator(self.seed, *block))
            x[start:stop] = _round(FAMILIES[self.distribution].values(z, dtype), dtype)
            z = _normal(stop - start, n, _generator(self.seed, "grad", *block))
            grad[start:stop] = _round(GRADS[self.grad](z, x[start:stop].double()), dtype)
        return reference.from_channel_rows(x, self.shape), reference.from_channel_rows(grad, self.shape)


def _generator(seed: int, *words: str) -> torch.Generator:
    # crc32 and not hash(): the latter is salted anew in every process.
    return torch.Generator().manual_seed(zlib.crc32("/".join((str(seed), *words)).encode()))


_PERIOD = 1_048_583
"""Longer rows repeat after this many values (a prime): drawing 2^31 normal numbers takes minutes."""


def _normal(rows: int, n: int, generator: torch.Generator) -> Tensor:
    z = torch.randn(rows, min(n, _PERIOD), generator=generator, dtype=torch.float64)
    return z if n <= _PERIOD else z.repeat(1, -(-n // _PERIOD))[:, :n]


def _round(t: Tensor, dtype: torch.dtype) -> Tensor:
    """To `dtype`; what is finite stays finite, so that only the distributions that mean infinity have one."""
    limit = torch.finfo(dtype).max
    return torch.where(t.isfinite(), t.clamp(-limit, limit), t).to(dtype)


def _finite_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    forward = reference.forward(x.double().nan_to_num(0.0, 0.0, 0.0))
    return forward.mean, forward.var


T = TypeVar("T")


class _Deck(Generic[T]):
    """Deals every item once, shuffled, before it deals one again: a grid without its full product."""

    def __init__(self, items: list[T], seed: int) -> None:
        self._items = items
        self._random = random.Random(seed)
        self._left: list[T] = []

    def deal(self, fits: Callable[[T], bool] = lambda item: True) -> T:
        for _ in range(2):
            for i, item in enumerate(self._left):
                if fits(item):
                    return self._left.pop(i)
            fresh = list(self._items)
            self._random.shuffle(fresh)
            self._left += fresh
        raise ValueError("no item of the deck fits")


class _Dealer:
    """Fills in what a grid leaves open, so that every value of every field is met often and in changing company."""

    def __init__(self, pool: tuple[Shape, ...]) -> None:
        self._shapes = _Deck(list(pool), 1)
        self._layouts = _Deck(list(LAYOUTS), 2)
        self._grad_layouts = _Deck(list(LAYOUTS), 3)
        self._grads = _Deck(list(GRADS), 4)
        self._weights = _Deck(list(WEIGHTS), 5)
        self._dtypes = _Deck(list(DTYPE_PAIRS), 6)
        self._distributions = _Deck(list(FAMILIES), 7)

    def case(
        self,
        distribution: str | None = None,
        dtypes: tuple[str, str] | None = None,
        shape: Shape | None = None,
        layout: str | None = None,
        grad: str | None = None,
        weight: str | None = None,
        training: bool = True,
    ) -> Case:
        if dtypes is None:
            known = FAMILIES[distribution] if distribution else None
            dtypes = self._dtypes.deal(lambda pair: known is None or known.fits(DTYPES[pair[0]]))
        held = DTYPES[dtypes[0]]
        distribution = distribution or self._distributions.deal(lambda name: FAMILIES[name].fits(held))
        shape = shape or self._shapes.deal()
        sizes = shape
        return Case(
            distribution,
            shape,
            *dtypes,
            layout or self._layouts.deal(lambda name: LAYOUTS[name].applies(sizes)),
            self._grad_layouts.deal(lambda name: LAYOUTS[name].applies(sizes)),
            grad or self._grads.deal(),
            weight or self._weights.deal(),
            training,
        )


def cases(tier: str = "quick") -> Iterator[Case]:
    """The grid of a tier, the same in every process.

    quick   every family, gradient and weight in every pair of dtypes, every small shape in every layout, training and
            inference; what is not crossed is dealt evenly. Some hundred cases of at most 50,000 elements, and N large.
    full    every family in every pair of dtypes on every small shape, every large shape in every pair of dtypes.
    huge    over 2^31 elements, in 16 bits: 5 GB a tensor and more.
    """
    if tier not in TIERS:
        raise ValueError(f"no tier {tier!r}; there are: {', '.join(TIERS)}")
    deal = _Dealer(shapes.QUICK).case
    if tier == "huge":
        for shape in shapes.HUGE:
            yield Case("offset_1e2", shape, "bfloat16", "float32")
            if len(shape) > 2:
                yield Case("offset_1e2", shape, "bfloat16", "float32", "channels_last")
        return
    for training in (True, False):
        for pair in DTYPE_PAIRS:
            fitting = [name for name, distribution in FAMILIES.items() if distribution.fits(DTYPES[pair[0]])]
            for distribution in fitting:
                dealt: tuple[Shape | None, ...] = shapes.QUICK if tier == "full" else (None,)
                for choice in dealt:
                    yield deal(distribution, pair, choice, training=training)
            for grad in GRADS:
                yield deal("normal", pair, grad=grad, training=training)
            for weight in WEIGHTS:
                yield deal("normal", pair, weight=weight, training=training)
        for shape in shapes.QUICK:
            for layout, arrangement in LAYOUTS.items():
                if arrangement.applies(shape):
                    yield deal(shape=shape, layout=layout, training=training)
    for shape in shapes.LARGE if tier == "full" else shapes.LARGE[:2]:
        for pair in DTYPE_PAIRS if tier == "full" else (("float32", "float32"), ("bfloat16", "float32")):
            yield deal("normal", pair, shape)
            yield deal(None, pair, shape)


def fused_cases(tier: str = "quick") -> Iterator[Case]:
    """Every epilogue in every pair of dtypes, in training and inference, the same in every process.

    quick   some distributions of each; full: all of them; huge: none, the plain cases have the indices.
    """
    if tier not in TIERS:
        raise ValueError(f"no tier {tier!r}; there are: {', '.join(TIERS)}")
    if tier == "huge":
        return
    deal = _Dealer(shapes.QUICK).case
    for training in (True, False):
        for epilogue in EPILOGUES[1:]:
            for pair in DTYPE_PAIRS:
                fitting = [name for name, distribution in FAMILIES.items() if distribution.fits(DTYPES[pair[0]])]
                dealt: list[str | None] = [*fitting] if tier == "full" else [None] * _FAMILIES_OF_A_FUSED_CASE
                for distribution in dealt:
                    yield replace(deal(distribution, pair, training=training), epilogue=epilogue)


_FAMILIES_OF_A_FUSED_CASE = 3
