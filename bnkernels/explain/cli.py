"""python -m bnkernels.explain: prints the execution plan of a BatchNorm for an input shape.

Exit code: 0 on success, 2 for an invalid argument.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from .devices import DEFAULT, NAMED
from .explanation import explain


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers such as 256,64,112,112, but got {text!r}") from None


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bnkernels.explain",
        description="Prints how a BatchNorm would run on a GPU: path, launch configuration and memory traffic.",
        epilog=f"Named devices: {', '.join(NAMED)}.",
    )
    parser.add_argument("--shape", type=_shape, required=True, metavar="N,C,...", help="shape of the input")
    parser.add_argument("--dtype", default="float32", help="float64, float32, float16 or bfloat16 (default: float32)")
    parser.add_argument("--layout", default="contiguous", help="nchw or nhwc (default: nchw, contiguous)")
    parser.add_argument(
        "--device", help=f"cuda, cuda:N, cpu or a named device (default: the GPU of this machine, else {DEFAULT})"
    )
    parser.add_argument("--residual", action="store_true", help="add a residual")
    parser.add_argument("--activation", help="apply an activation: relu")
    parser.add_argument("--inference", action="store_true", help="explain inference instead of training")
    parser.add_argument("--json", action="store_true", help="print all values as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line interface with argv (default: sys.argv[1:]) and returns the exit code."""
    given = _arguments(argv)
    try:
        explanation = explain(
            given.shape,
            dtype=given.dtype,
            layout=given.layout,
            device=given.device,
            training=not given.inference,
            residual=given.residual,
            activation=given.activation,
        )
    except (TypeError, ValueError) as error:
        print(f"bnkernels.explain: {error}", file=sys.stderr)
        return 2
    print(json.dumps(explanation.as_json(), indent=1, allow_nan=False) if given.json else explanation)
    return 0
