"""The tolerance that defines correctness, and the test inputs shared by all tests and the check.

    tolerance       how far an output may be from the float64 reference
    calls           inputs and outputs of one call, compared with the reference
    epilogue        the same with an addition, a ReLU or both
    distributions   adversarial values
    shapes          shapes, each with its reason
    layouts         strides, guard bands, poisoned memory
    cases           named, reproducible test cases, and the grids of each tier

Pure torch: this package does not use any backend, so it shares no code with the kernels under test.
"""

from .calls import Inputs, Outputs, judge_call, judge_calls
from .cases import DTYPE_PAIRS, DTYPES, TIERS, Case, cases, fused_cases
from .distributions import FAMILIES, GRADS, WEIGHTS, Distribution
from .epilogue import (
    EPILOGUES,
    Epilogue,
    assert_bounds_are_exact,
    at_the_sum,
    behind_relu,
    expect_fused,
    judge_fused,
    judge_fused_call,
    let_through,
    make_epilogue,
    make_residual,
    wrongly_masked,
)
from .layouts import LAYOUTS, Guarded, guarded, lay_out, misaligned, poisoned_allocations, same_bits
from .tolerance import (
    REPORT_FROM,
    UNIT_ROUNDOFF,
    ErrorReport,
    Expectation,
    K,
    accumulate_roundoff,
    assert_within,
    expect_backward,
    expect_forward,
    judge,
)

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
    "Distribution",
    "Epilogue",
    "ErrorReport",
    "Expectation",
    "Guarded",
    "Inputs",
    "K",
    "Outputs",
    "accumulate_roundoff",
    "assert_bounds_are_exact",
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
    "wrongly_masked",
]
