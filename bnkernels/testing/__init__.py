"""What correct means here, and the inputs to see it on: the gate and the one generator that all tests share.

    gate       how far an output may lie from the float64 reference
    calls      the inputs and outputs of one call, judged
    epilogue     the same with an addition, a ReLU or both behind it
    families   adversarial values
    shapes     shapes, each with its reason
    layouts    strides, guard bands, poisoned memory
    cases      named, reproducible cases made of these, and the grids of each tier

Pure torch: nothing here knows a backend, so that what judges a kernel shares no code with it.
"""

from .calls import Inputs, Outputs, judge_call, judge_calls
from .cases import DTYPE_PAIRS, DTYPES, TIERS, Case, cases, fused_cases
from .epilogue import (
    EPILOGUES,
    Epilogue,
    assert_range_is_exact,
    at_the_sum,
    behind_relu,
    expect_fused,
    judge_fused,
    judge_fused_call,
    let_through,
    make_epilogue,
    make_residual,
    wrongly_gated,
)
from .families import FAMILIES, GRADS, WEIGHTS, Family
from .gate import (
    REPORT_FROM,
    UNIT_ROUNDOFF,
    Expectation,
    K,
    Verdict,
    accumulate_roundoff,
    assert_within,
    expect_backward,
    expect_forward,
    judge,
)
from .layouts import LAYOUTS, Guarded, guarded, lay_out, misaligned, poisoned_allocations, same_bits

__all__ = [
    "DTYPES",
    "DTYPE_PAIRS",
    "EPILOGUES",
    "FAMILIES",
    "GRADS",
    "LAYOUTS",
    "REPORT_FROM",
    "TIERS",
    "UNIT_ROUNDOFF",
    "WEIGHTS",
    "Case",
    "Epilogue",
    "Expectation",
    "Family",
    "Guarded",
    "Inputs",
    "K",
    "Outputs",
    "Verdict",
    "accumulate_roundoff",
    "assert_range_is_exact",
    "assert_within",
    "at_the_sum",
    "behind_relu",
    "cases",
    "expect_backward",
    "expect_forward",
    "expect_fused",
    "fused_cases",
    "guarded",
    "judge",
    "judge_call",
    "judge_calls",
    "judge_fused",
    "judge_fused_call",
    "lay_out",
    "let_through",
    "make_epilogue",
    "make_residual",
    "misaligned",
    "poisoned_allocations",
    "same_bits",
    "wrongly_gated",
]
