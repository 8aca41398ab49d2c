"""Checks of a host run of kernels with an epilogue."""

from __future__ import annotations

from torch import Tensor

from bnkernels.testing import Epilogue, Inputs, Outputs, assert_bounds_are_exact, assert_within, judge_fused


def assert_fused(
    inputs: Inputs, epilogue: Epilogue, outputs: Outputs, results: dict[str, Tensor], context: object
) -> None:
    assert_within(judge_fused(inputs, epilogue, outputs), str(context))
    if epilogue.has_bounds:
        assert outputs.y is not None
        assert_bounds_are_exact(inputs, outputs.y, results["relu_low"], results["relu_high"], context)
