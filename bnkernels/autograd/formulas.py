"""The derivatives of batch_norm beyond the kernels' backward, as plain torch formulas.

Used for double backward, for forward-mode AD, and where a compiler traces a transform. Being made of torch's own
differentiable operations, they can be differentiated again, to any order and in either mode, and vmapped.

Notation, per channel, with <u, v> the sum of u*v over the channel's n elements and I = (var + eps)^-1/2:

    xhat = (x - mean) I                           the input, standardised
    P v  = v - <1, v>/n - xhat <xhat, v>/n        in training: what is left of v once the statistics follow it;
    P v  = v                                      in inference, where they are constants. Both are symmetric.

    y = w xhat + b          d xhat = I P dx          dI = -I^2 <xhat, dx>/n   (0 in inference)

and the backward of y for a gradient g is   db = <1, g>,   dw = <g, xhat>,   dx = w I P g.
(These hold for eps > 0 too, where <xhat, xhat>/n is not 1.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Standardised:
    """xhat, I and the sums above for one x, in the accumulation dtype.

    In training the statistics are computed from x again, as part of the formula: the ones that were saved would be
    constants to whoever differentiates this.
    """

    def __init__(self, x: Tensor, mean: Tensor | None, invstd: Tensor | None, training: bool, eps: float) -> None:
        self.dtype = _accumulate_dtype(x)
        self.channel = [1, -1] + [1] * (x.dim() - 2)  # the shape in which a (C,) tensor meets x
        self.others = [0, *range(2, x.dim())]  # the dimensions that are summed over
        self.batch_statistics = training and self.has_values(x)
        x = x.to(self.dtype)
        if self.batch_statistics:
            self.batch_mean = self.mean(x)
            centred = x - self.batch_mean
            self.batch_var = self.mean(centred.square())
            self.invstd = (self.batch_var + eps).rsqrt()
            self.xhat = centred * self.invstd
        else:
            assert mean is not None and invstd is not None
            self.invstd = self.spread(invstd)
            self.xhat = (x - self.spread(mean)) * self.invstd

    def has_values(self, x: Tensor) -> bool:
        """Whether there is anything to take statistics of."""
        return x.numel() > 0

    def spread(self, vector: Tensor) -> Tensor:
        """(C,) to a shape that broadcasts with x."""
        return vector.to(self.dtype).view(self.channel)

    def sum(self, v: Tensor) -> Tensor:
        """<1, v>, of shape (C,)."""
        return v.sum(self.others)

    def mean(self, v: Tensor) -> Tensor:
        """<1, v>/n, in a shape that broadcasts with x."""
        return v.mean(self.others, keepdim=True)

    def project(self, v: Tensor) -> Tensor:
        """P v."""
        return v - self.mean(v) - self.xhat * self.mean(self.xhat * v) if self.batch_statistics else v

    def scale(self, weight: Tensor | None) -> Tensor:
        """w I."""
        return self.invstd if weight is None else self.invstd * self.spread(weight)


class Synchronised(Standardised):
    """The same of an x that is this rank's part of a batch: means are those of the whole batch, sums the rank's own.

    count: of a channel's values on all ranks, one element. total: sums a tensor over the ranks, differentiably.
    """

    def __init__(self, x: Tensor, eps: float, count: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        self.count, self.total = count, total
        super().__init__(x, None, None, True, eps)

    def has_values(self, x: Tensor) -> bool:
        return True  # on some rank

    def mean(self, v: Tensor) -> Tensor:
        return self.spread(self.total(self.sum(v)) / self.count.to(self.dtype))


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """batch_norm as a whole: y = w xhat + b, and the three buffers in place."""
    if training and x.numel() > 0:
        s = Standardised(x, None, None, True, eps)
    elif running_mean is not None and running_var is not None:
        s = Standardised(x, running_mean, (running_var.to(_accumulate_dtype(x)) + eps).rsqrt(), False, eps)
    else:
        return x.clone()  # nothing to normalise, and nothing to normalise it by
    y = s.xhat if weight is None else s.xhat * s.spread(weight)
    y = y if bias is None else y + s.spread(bias)

    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if s.batch_statistics and running_mean is not None and running_var is not None:
        factor: float | Tensor = 0.0
        if momentum is not None:
            factor = momentum
        elif num_batches_tracked is not None:
            factor = num_batches_tracked.reciprocal()
        n = x.numel() // x.shape[1]
        for buffer, fresh in ((running_mean, s.batch_mean), (running_var, s.batch_var * (n / (n - 1)))):
            buffer.add_(factor * (fresh.detach().flatten() - buffer))
    return y.to(x.dtype)


def forward_tangent(
    s: Standardised, weight: Tensor | None, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
) -> Tensor | None:
    """dy = w I P dx + dw xhat + db."""
    terms = []
    if dx is not None:
        terms.append(s.scale(weight) * s.project(dx.to(s.dtype)))
    if dweight is not None:
        terms.append(s.xhat * s.spread(dweight))
    if dbias is not None:
        terms.append(s.spread(dbias).expand_as(s.xhat))
    return _total(terms)


def backward_tangent(
    s: Standardised,
    grad: Tensor,
    weight: Tensor | None,
    dgrad: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The tangents of (dx, dw, db) of backward for tangents of its g, x and w."""
    g = grad.to(s.dtype)
    input_terms, weight_terms, grad_bias = [], [], None
    if dgrad is not None:
        dg = dgrad.to(s.dtype)
        input_terms.append(s.scale(weight) * s.project(dg))
        weight_terms.append(s.sum(dg * s.xhat))
        grad_bias = s.sum(dg)
    if dx is not None:
        dx = dx.to(s.dtype)
        dxhat = s.invstd * s.project(dx)
        weight_terms.append(s.sum(g * dxhat))
        if s.batch_statistics:
            dinvstd = -s.invstd.square() * s.mean(s.xhat * dx)
            dproject = -dxhat * s.mean(s.xhat * g) - s.xhat * s.mean(dxhat * g)  # (dP) g
            factor = 1 if weight is None else s.spread(weight)
            input_terms.append(factor * (dinvstd * s.project(g) + s.invstd * dproject))
    if dweight is not None:
        input_terms.append(s.spread(dweight) * s.invstd * s.project(g))
    return _total(input_terms), _total(weight_terms), grad_bias


def double_backward(
    s: Standardised,
    grad: Tensor,
    weight: Tensor | None,
    cotangents: tuple[Tensor | None, ...],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients with respect to g, x and w of L = <u, dx> + a dw + b db, for cotangents (u, a, b); those of `needs`.

    With S = <u, P g>, L = w I S + a <g, xhat> + b <1, g>, hence

        dL/dg = w I P u + a xhat + b
        dL/dw = I S
        dL/dx = a I P g                                                              in inference, and in training
                a I P g - w I^2 (P u <g, xhat>/n + P g <u, xhat>/n + xhat S/n)
    """
    u, a, b = cotangents
    need_grad, need_input, need_weight = needs
    g = grad.to(s.dtype)
    grad_terms, input_terms, grad_weight = [], [], None
    if u is not None:
        u = u.to(s.dtype)
        projected_u = s.project(u)
        if need_grad:
            grad_terms.append(s.scale(weight) * projected_u)
        if need_weight:
            grad_weight = s.sum(projected_u * g * s.invstd)
        if need_input and s.batch_statistics:
            bracket = (
                projected_u * s.mean(g * s.xhat) + s.project(g) * s.mean(u * s.xhat) + s.xhat * s.mean(projected_u * g)
            )
            input_terms.append(-s.scale(weight) * s.invstd * bracket)
    if a is not None:
        a = s.spread(a)
        if need_grad:
            grad_terms.append(a * s.xhat)
        if need_input:
            input_terms.append(s.invstd * s.project(a * g))  # a may differ from rank to rank
    if b is not None and need_grad:
        grad_terms.append(s.spread(b).expand_as(g))
    return _total(grad_terms), _total(input_terms), grad_weight


def passed_by_relu(grad: Tensor, x: Tensor, relu_bounds: Tensor) -> Tensor:
    """grad where the ReLU of a fused forward let x pass, else 0. relu_bounds (2, C): least and greatest such x."""
    low, high = relu_bounds.view(2, 1, -1, *[1] * (x.dim() - 2))
    value = x.to(low.dtype)
    return grad.masked_fill((value < low) | (value > high), 0)


def _total(terms: list[Tensor]) -> Tensor | None:
    return sum(terms[1:], start=terms[0]) if terms else None
