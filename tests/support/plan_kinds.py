"""A case for every kind of plan on a GPU, with the sizes of real layers."""

from __future__ import annotations

import torch
from plan_model import DEVICES, Problem

from bnkernels.explain.devices import Limits
from bnkernels.testing import Case

# Kinds of the forward and the backward: layout, group, "two_shot" for that all-reduce, "part" if not all is cached.
KINDS = {
    Case("offset_1e2", (32, 512, 28, 28), "bfloat16", "float32"): (
        "channels_first cta",
        "channels_first cta",
    ),
    Case("offset_1e2", (32, 64, 56, 56), "bfloat16", "float32"): (
        "channels_first cluster",
        "channels_first cluster",
    ),
    Case("offset_1e2", (64, 64, 112, 112), "bfloat16", "float32"): (
        "channels_first grid",
        "channels_first grid",
    ),
    Case("offset_1e2", (32, 1024, 14, 14), "bfloat16", "float32"): ("packed cta", "packed cta"),
    Case("offset_1e2", (32, 256, 14, 14), "bfloat16", "float32"): ("packed cluster", "packed cluster"),
    Case("offset_1e2", (32, 1024, 14, 14), "bfloat16", "float32", "channels_last"): (
        "channels_last cluster",
        "channels_last cluster",
    ),
    Case("offset_1e2", (32, 512, 14, 14), "bfloat16", "float32", "channels_last"): (
        "channels_last grid",
        "channels_last grid",
    ),
    Case("offset_1e2", (32, 64, 56, 56), "bfloat16", "float32", "channels_last"): (
        "channels_last grid two_shot",
        "channels_last grid two_shot",
    ),
    Case("offset_1e2", (64, 64, 112, 112), "bfloat16", "float32", "channels_last"): (
        "channels_last grid two_shot part",
        "channels_last grid two_shot part",
    ),
    Case("offset_1e2", (32, 64, 113, 113)): (
        "channels_first grid",
        "channels_first grid",
    ),
    Case("offset_1e2", (200_000, 96), "float16"): (
        "channels_last grid two_shot",
        "channels_last grid two_shot",
    ),
}


def kind(case: Case, pass_: str, limits: Limits = DEVICES["h200"]) -> str:
    batch, channels, *rest = case.shape
    pixels = torch.Size(rest).numel()
    last = case.layout == "channels_last" or not rest
    problem = Problem(batch * pixels, channels, 1, case.dtype) if last else Problem(batch, channels, pixels, case.dtype)
    plan = problem.plan(pass_, limits)
    persistent = plan["persistent"]
    if persistent is None:
        return "two_pass"
    words = [persistent["partition"]["layout"], persistent["group"]]
    words += ["two_shot"] * persistent["two_shot"] + ["part"] * (plan["predicted"] != plan["floor"])
    return " ".join(words)
