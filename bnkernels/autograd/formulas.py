"""The derivatives of batch_norm that the kernels do not compute, in torch operations.

Used for double backward, for forward-mode AD, and when a compiler traces a transform of torch.func. They consist of
torch's differentiable operations, so they support further differentiation, to any order and in either mode, and vmap.

Notation, per channel, with <u, v> the sum of u*v over the channel's n elements and I = (var + eps)^-1/2:

    xhat = (x - mean) I                           the normalised input
    P v  = v - <1, v>/n - xhat <xhat, v>/n        in training, where the statistics depend on x;
    P v  = v                                      in inference, where they are constants. P is symmetric.

    y = w xhat + b          d xhat = I P dx          dI = -I^2 <xhat, dx>/n   (0 in inference)

and the backward of y for a gradient g is   db = <1, g>,   dw = <g, xhat>,   dx = w I P g.
(They also hold for eps > 0, where <xhat, xhat>/n != 1.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class NormalisedInput:
    """xhat, I and the sums above for an input x (N, C, *), in the accumulation dtype.

    In training the statistics are recomputed from x, because the saved ones have no autograd graph and would be treated
    as constants when these formulas are differentiated.
    """

    def __init__(self, x: Tensor, mean: Tensor | None, invstd: Tensor | None, training: bool, eps: float) -> None:
        self.dtype = _accumulate_dtype(x)
        self.channel = [1, -1] + [1] * (x.dim() - 2)  # the shape in which a (C,) tensor broadcasts with x
        self.reduced_dims = [0, *range(2, x.dim())]  # the reduced dimensions
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
            self.invstd = self.broadcast(invstd)
            self.xhat = (x - self.broadcast(mean)) * self.invstd

    def has_values(self, x: Tensor) -> bool:
        """Whether x has elements to compute statistics from."""
        return x.numel() > 0

    def broadcast(self, vector: Tensor) -> Tensor:
        """(C,) to a shape that broadcasts with x."""
        return vector.to(self.dtype).view(self.channel)

    def sum(self, v: Tensor) -> Tensor:
        """<1, v>, of shape (C,)."""
        return v.sum(self.reduced_dims)

    def mean(self, v: Tensor) -> Tensor:
        """<1, v>/n, of a shape that broadcasts with x."""
        return v.mean(self.reduced_dims, keepdim=True)

    def project(self, v: Tensor) -> Tensor:
        """P v."""
        return v - self.mean(v) - self.xhat * self.mean(self.xhat * v) if self.batch_statistics else v

    def scale(self, weight: Tensor | None) -> Tensor:
        """w I."""
        return self.invstd if weight is None else self.invstd * self.broadcast(weight)


class SynchronisedInput(NormalisedInput):
    """NormalisedInput for this rank's part x of a batch: mean() averages over all ranks, sum() over this rank's part.

    count: the number of values per channel on all ranks, one element. total: a differentiable sum over the ranks.
    """

    def __init__(self, x: Tensor, eps: float, count: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        self.count, self.total = count, total
        super().__init__(x, None, None, True, eps)

    def has_values(self, x: Tensor) -> bool:
        return True  # some rank has values

    def mean(self, v: Tensor) -> Tensor:
        return self.broadcast(self.total(self.sum(v)) / self.count.to(self.dtype))


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
    """batch_norm: returns y = w xhat + b, in the dtype of x, and updates the three buffers in place."""
    if training and x.numel() > 0:
        s = NormalisedInput(x, None, None, True, eps)
    elif running_mean is not None and running_var is not None:
        s = NormalisedInput(x, running_mean, (running_var.to(_accumulate_dtype(x)) + eps).rsqrt(), False, eps)
    else:
        return x.clone()  # an empty batch, without running statistics
    y = s.xhat if weight is None else s.xhat * s.broadcast(weight)
    y = y if bias is None else y + s.broadcast(bias)

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
    s: NormalisedInput, weight: Tensor | None, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
) -> Tensor | None:
    """dy = w I P dx + dw xhat + db."""
    terms = []
    if dx is not None:
        terms.append(s.scale(weight) * s.project(dx.to(s.dtype)))
    if dweight is not None:
        terms.append(s.xhat * s.broadcast(dweight))
    if dbias is not None:
        terms.append(s.broadcast(dbias).expand_as(s.xhat))
    return _total(terms)


def backward_tangent(
    s: NormalisedInput,
    grad: Tensor,
    weight: Tensor | None,
    dgrad: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The tangents of the backward's results (dx, dw, db) for tangents of g, x and w."""
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
            factor = 1 if weight is None else s.broadcast(weight)
            input_terms.append(factor * (dinvstd * s.project(g) + s.invstd * dproject))
    if dweight is not None:
        input_terms.append(s.broadcast(dweight) * s.invstd * s.project(g))
    return _total(input_terms), _total(weight_terms), grad_bias


def double_backward(
    s: NormalisedInput,
    grad: Tensor,
    weight: Tensor | None,
    cotangents: tuple[Tensor | None, ...],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of L = <u, dx> + a dw + b db with respect to g, x and w, for cotangents (u, a, b).

    needs says which of the three to compute; the others are None. With S = <u, P g>,

        L = w I S + a <g, xhat> + b <1, g>

    and hence

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
        a = s.broadcast(a)
        if need_grad:
            grad_terms.append(a * s.xhat)
        if need_input:
            input_terms.append(s.invstd * s.project(a * g))  # a may differ between ranks
    if b is not None and need_grad:
        grad_terms.append(s.broadcast(b).expand_as(g))
    return _total(grad_terms), _total(input_terms), grad_weight


def relu_backward(grad: Tensor, x: Tensor, relu_bounds: Tensor) -> Tensor:
    """The ReLU's backward: grad where the ReLU of the forward's epilogue was positive, else 0.

    relu_bounds (2, C): the smallest and largest x of each channel whose result is positive.
    """
    low, high = relu_bounds.view(2, 1, -1, *[1] * (x.dim() - 2))
    value = x.to(low.dtype)
    return grad.masked_fill((value < low) | (value > high), 0)


def _total(terms: list[Tensor]) -> Tensor | None:
    return sum(terms[1:], start=terms[0]) if terms else None
