"""Fakes shared by the tests of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.harness import timing


@pytest.fixture
def single_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotate over one copy: what is rotated does not matter where nothing is timed."""
    monkeypatch.setattr(timing, "ROTATED_BYTES", 1)


@pytest.fixture
def fixed_timing() -> Callable[..., timing.Timing]:
    """A timer that times nothing."""
    return lambda calls, graph: timing.Timing(100.0, 90.0, 95.0, 110.0, 20, len(calls), graph)
