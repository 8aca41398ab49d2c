"""Runs the ops of SyncBatchNorm for several ranks sequentially in one process."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from .. import _ops as ops
from ..testing import Inputs, Outputs


def call_in_ranks(inputs: Inputs, bounds: Sequence[int]) -> Outputs:
    """Forward and backward in training for ranks with x[bounds[0]:bounds[1]] etc., concatenated.

    The ops return each rank's gradients of weight and bias rounded to the parameters' dtype. The gradients returned
    here are sums of the exchanged rows instead, in the dtype of the statistics.
    """
    parts = [(inputs.x[a:b], inputs.grad[a:b]) for a, b in pairwise(bounds)]
    weight, bias = inputs.weight, inputs.bias
    buffers = (inputs.running_mean, inputs.running_var, inputs.num_batches_tracked)
    running_mean, running_var, counter = (None if buffer is None else buffer.clone() for buffer in buffers)
    rows = torch.stack([ops.sync_statistics(x, inputs.eps) for x, _ in parts])
    mean, invstd, count = ops.sync_combine(
        rows, running_mean, running_var, counter, inputs.momentum, inputs.eps, inputs.x.dtype
    )
    y = [ops.sync_normalize(x, weight, bias, mean, invstd) for x, _ in parts]
    rows = torch.stack([ops.sync_grad_sums(grad, x, weight, mean, invstd, True, True)[0] for x, grad in parts])
    dx = [ops.sync_grad_input(grad, x, weight, mean, invstd, rows, count) for x, grad in parts]
    dbias, dweight = rows.sum(0).to(mean.dtype).view(2, -1)
    return Outputs(torch.cat(y), mean, invstd, running_mean, running_var, counter, torch.cat(dx), dweight, dbias)
