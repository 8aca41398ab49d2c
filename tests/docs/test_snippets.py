"""The Python examples of the documentation and of docstrings run.

The blocks of a page run in order in one namespace, which begins with what a reader is assumed to have: a model, an
input, and the arguments of batch_norm(). Their results are tested elsewhere.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import bnkernels as bnk

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def namespace(image_channels: int) -> dict[str, Any]:
    torch.manual_seed(0)
    channels = 64  # of the pages' layers
    block = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
    first = nn.Conv2d(image_channels, channels, 3, padding=1)
    x = torch.randn(4, channels, 8, 8)
    return {
        "bnk": bnk,
        "torch": torch,
        "model": nn.Sequential(first, nn.BatchNorm2d(channels), nn.ReLU(), block),
        "block": block,
        "criterion": nn.MSELoss(),
        "x": x,
        "residual": torch.randn_like(x),
        "target": torch.randn_like(x),
        "running_mean": torch.zeros(channels),
        "running_var": torch.ones(channels),
        "weight": torch.ones(channels),
        "bias": torch.zeros(channels),
    }


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:convert.. changed no BatchNorm")  # of filter_fn's example
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_page(page: str, one_process: None) -> None:
    names = namespace(image_channels=3 if page == "docs/explain.md" else 64)
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)


def test_pages_have_examples() -> None:
    assert blocks("README.md") and blocks("docs/usage.md")


def modules() -> list[str]:
    found = pkgutil.walk_packages(bnk.__path__, "bnkernels.")
    return ["bnkernels", *(module.name for module in found if module.name.split(".")[-1] not in ("__main__", "_C"))]


@pytest.mark.parametrize("name", modules())
def test_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
