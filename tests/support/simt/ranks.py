"""A batch on several ranks, on the host execution of the kernels: each rank's steps run sequentially."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from bnkernels.testing import Inputs, Outputs

from .server import How, Launch, Run, Server


def call(server: Server, inputs: Inputs, bounds: Sequence[int], how: How, *, channels_last: bool) -> Run:
    """The forward and backward of ranks that hold x[bounds[0]:bounds[1]] and so on, concatenated like one rank's
    results.

    An empty rank runs no kernel: its rows are zeros. The parameters' gradients are summed over the ranks.
    """
    channels = inputs.x.shape[1]
    kind = torch.float64 if inputs.x.dtype == torch.float64 else torch.float32
    launches: list[Launch] = []

    def step(name: str, x: Tensor, given: dict[str, Tensor | None], out: dict[str, Tensor], **options: object):
        tensors = [(key, "in", t) for key, t in given.items() if t is not None]
        tensors += [(key, "inout" if key.startswith("running") else "out", t) for key, t in out.items()]
        run = server.step(f"sync_{name}", x, tensors, options, how, channels_last=channels_last)
        launches.extend(run.launches)
        return run.results

    def row(size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64)

    def statistic() -> Tensor:
        return torch.empty(channels, dtype=kind)

    parts = [(inputs.x[a:b], inputs.grad[a:b]) for a, b in pairwise(bounds)]
    rows = []
    for x, _ in parts:
        sent = row(2 * channels + 1)
        rows.append(step("statistics", x, {"x": x}, {"row": sent}, eps=inputs.eps)["row"] if x.numel() else sent)

    # The op counts the batch before the combine kernel runs.
    counter = None if inputs.num_batches_tracked is None else inputs.num_batches_tracked + 1
    cumulative = inputs.momentum is None
    buffers = {name: getattr(inputs, name) for name in ("running_mean", "running_var")}
    combined = step(
        "combine",
        inputs.x,
        {"rows": torch.stack(rows), "num_batches_tracked": counter},
        {"mean": statistic(), "invstd": statistic(), "count": row(1)}
        | {name: t for name, t in buffers.items() if t is not None},
        ranks=len(rows),
        momentum=0.0 if cumulative else inputs.momentum,
        cumulative=int(cumulative),
        eps=inputs.eps,
    )
    statistics = {"mean": combined["mean"], "invstd": combined["invstd"]}

    parameter = inputs.weight if inputs.weight is not None else statistics["mean"]
    y, sums = [], []
    for x, grad in parts:
        if x.numel() == 0:
            empty = torch.zeros_like(parameter)
            sums.append({"row": row(2 * channels), "grad_weight": empty, "grad_bias": empty})
            continue
        affine = {"weight": inputs.weight, "bias": inputs.bias}
        y.append(step("normalize", x, {"x": x} | affine | statistics, {"y": torch.empty_like(x)})["y"])
        out = {"row": row(2 * channels)} | {name: torch.empty_like(parameter) for name in ("grad_weight", "grad_bias")}
        sums.append(step("grad_sums", x, {"x": x, "grad_y": grad} | statistics, out))

    reduced = {"rows": torch.stack([each["row"] for each in sums]), "count": combined["count"], "weight": inputs.weight}
    dx = [
        step(
            "grad_input",
            x,
            {"x": x, "grad_y": grad} | statistics | reduced,
            {"grad_x": torch.empty_like(x)},
            ranks=len(rows),
        )["grad_x"]
        for x, grad in parts
        if x.numel()
    ]
    outputs = Outputs(
        y=torch.cat(y),
        mean=combined["mean"],
        invstd=combined["invstd"],
        running_mean=combined.get("running_mean"),
        running_var=combined.get("running_var"),
        num_batches_tracked=counter,
        dx=torch.cat(dx),
        dweight=torch.stack([each["grad_weight"] for each in sums]).sum(0),
        dbias=torch.stack([each["grad_bias"] for each in sums]).sum(0),
    )
    return Run(outputs, launches, [])
