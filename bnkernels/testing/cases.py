"""Test cases, each reproducible from its name, and the grids of cases that the tests and the check run.

A name consists of seven or eight fields joined by "/":

    distribution / shape / dtype[+parameters'] / layout[+gradient's] / gradient / weight / train|eval[+seed] [/
    epilogue] offset_1e4/8x64x14x14/float16+float32/channels_last/xhat/normal/train
    normal/4x3x5x7/float32/contiguous/normal/normal/eval/add+relu

Values depend on the distributions, the shape and the seed. dtype only rounds them and layout only changes strides, so
cases that differ only in these have the same values.
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
    """A call, specified by the names of its parts. Raises ValueError for unknown or incompatible names."""

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
    """The operations fused after normalisation (EPILOGUES). Only fused_cases() have one."""

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
                raise ValueError(f"unknown {field} {value!r}: expected one of {', '.join(filter(None, known))}")
        if len(self.shape) < 2 or min(self.shape) < 1 or self.elements_per_channel < 2:
            raise ValueError(f"expected a shape (N, C, *) with at least 2 values per channel, but got {self.shape}")
        if (self.dtype, self.parameters) not in DTYPE_PAIRS:
            raise ValueError(f"{self.dtype} inputs do not support {self.parameters} parameters")
        if not FAMILIES[self.distribution].fits(DTYPES[self.dtype]):
            raise ValueError(f"{self.dtype} cannot represent the values of {self.distribution}")
        for layout in (self.layout, self.grad_layout):
            if not LAYOUTS[layout].applies(self.shape):
                raise ValueError(f"layout {layout} does not apply to shape {self.shape}")

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
            expected = "distribution/shape/dtype/layout/gradient/weight/train|eval[/epilogue]"
            raise ValueError(f"expected a case {expected} of 7 or 8 fields, but {name!r} has {len(fields)}")
        distribution, shape, dtype, layout, grad, weight, mode = fields[:7]
        epilogue = "".join(fields[7:])
        dtype, _, parameters = dtype.partition("+")
        layout, _, grad_layout = layout.partition("+")
        mode, _, seed = mode.partition("+")
        if mode not in ("train", "eval"):
            raise ValueError(f"expected train or eval, but got {mode!r}")
        try:
            sizes = tuple(int(s) for s in shape.split("x"))
            number = int(seed or 0)
        except ValueError:
            raise ValueError(f"expected integers for shape and seed, but got {name!r}") from None
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
        """New tensors for this case on `device`. Every call returns the same bits."""
        dtype, parameters = DTYPES[self.dtype], DTYPES[self.parameters]
        x, grad = self._activations(dtype)
        channels = self.shape[1]
        generator = _generator(self.seed, "parameters", self.weight, str(channels))
        z = torch.randn(3, channels, generator=generator, dtype=torch.float64)
        weight, bias = WEIGHTS[self.weight](z[0], z[1])
        if self.training:
            mean, var = z[2], z[2].abs() + 0.5
        else:
            # Close to the batch statistics, as after training on such data, but not equal.
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
        """x and its gradient, contiguous (N, C, *), generated in blocks of channels to limit the float64 copies."""
        channels, n = self.shape[1], self.elements_per_channel
        x = torch.empty(channels, n, dtype=dtype)
        grad = torch.empty(channels, n, dtype=dtype)
        step = max(1, (1 << 22) // n)
        # Distributions apply to each block: one_nan and first_1e5 place one element per block.
        for start in range(0, channels, step):
            stop = min(start + step, channels)
            block = (self.distribution, str(self.shape), str(start))
            z = _normal(stop - start, n, _generator(self.seed, *block))
            x[start:stop] = _round(FAMILIES[self.distribution].values(z, dtype), dtype)
            z = _normal(stop - start, n, _generator(self.seed, "grad", *block))
            grad[start:stop] = _round(GRADS[self.grad](z, x[start:stop].double()), dtype)
        return reference.from_channel_rows(x, self.shape), reference.from_channel_rows(grad, self.shape)


def _generator(seed: int, *words: str) -> torch.Generator:
    # crc32 instead of hash(), which is salted per process.
    return torch.Generator().manual_seed(zlib.crc32("/".join((str(seed), *words)).encode()))


_PERIOD = 1_048_583
"""Longer rows repeat after this many values (a prime), because generating 2^31 normal values takes minutes."""


def _normal(rows: int, n: int, generator: torch.Generator) -> Tensor:
    z = torch.randn(rows, min(n, _PERIOD), generator=generator, dtype=torch.float64)
    return z if n <= _PERIOD else z.repeat(1, -(-n // _PERIOD))[:, :n]


def _round(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds to `dtype`, saturating finite values, so that only distributions with infinities produce them."""
    limit = torch.finfo(dtype).max
    return torch.where(t.isfinite(), t.clamp(-limit, limit), t).to(dtype)


def _finite_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    forward = reference.forward(x.double().nan_to_num(0.0, 0.0, 0.0))
    return forward.mean, forward.var


T = TypeVar("T")


class _Deck(Generic[T]):
    """Deals items in shuffled order, each once per round: covers all values without their full product."""

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
        raise ValueError("no item of the deck satisfies the condition")


class _Dealer:
    """Fills the unspecified fields of cases, so that every value of every field occurs often and in varied
    combinations."""

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

    quick   every distribution, gradient and weight in every pair of dtypes, every small shape in every layout, training
            and inference; other combinations are dealt evenly. Some hundred cases of at most 50,000 elements, and some
            with large N.
    full    every distribution in every pair of dtypes on every small shape, every large shape in every pair of dtypes.
    huge    more than 2^31 elements, in 16 bits: at least 5 GB per tensor.
    """
    if tier not in TIERS:
        raise ValueError(f"unknown tier {tier!r}: expected one of {', '.join(TIERS)}")
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

    quick   some distributions each
    full    all distributions
    huge    none: the cases without an epilogue already cover large indices
    """
    if tier not in TIERS:
        raise ValueError(f"unknown tier {tier!r}: expected one of {', '.join(TIERS)}")
    if tier == "huge":
        return
    deal = _Dealer(shapes.QUICK).case
    for training in (True, False):
        for epilogue in EPILOGUES[1:]:
            for pair in DTYPE_PAIRS:
                fitting = [name for name, distribution in FAMILIES.items() if distribution.fits(DTYPES[pair[0]])]
                dealt: list[str | None] = [*fitting] if tier == "full" else [None] * _DISTRIBUTIONS_PER_EPILOGUE
                for distribution in dealt:
                    yield replace(deal(distribution, pair, training=training), epilogue=epilogue)


_DISTRIBUTIONS_PER_EPILOGUE = 3
