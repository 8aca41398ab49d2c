"""Fixtures for test modules with `pytest_plugins = ["simt.fixtures"]`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .common import Servers
from .server import Server


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """run_kernels in every build."""
    made = Servers()
    yield made
    made.close()


@pytest.fixture
def plain(servers: Servers) -> Server:
    """run_kernels without a sanitizer."""
    return servers("plain")
