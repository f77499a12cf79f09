"""The one way a Triton kernel is launched here, so that launches can be counted or compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One launch: the `@triton.jit` function, its grid, its arguments and its options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel function's name."""
        return str(self.kernel.__name__)


_observers: list[tuple[Callable[[Launch], None], bool]] = []


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Run `kernel` over `grid`; a grid with a zero is no launch at all.

    Args:
        kernel: a function decorated with `@triton.jit`.
        grid: one to three numbers of programs.
        args, options: the kernel's arguments; options also holds num_warps and num_stages.
    """
    if 0 in grid:
        return
    called = Launch(kernel, tuple(grid), args, options)
    for observer, _ in _observers:
        observer(called)
    if all(runs for _, runs in _observers):
        kernel[called.grid](*args, **options)


@contextmanager
def observed(observer: Callable[[Launch], None], runs: bool = True) -> Iterator[None]:
    """Show every launch inside the block to `observer`; with `runs` false nothing is run."""
    _observers.append((observer, runs))
    try:
        yield
    finally:
        _observers.pop()


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the kernels launched inside the block, in order."""
    names: list[str] = []
    with observed(lambda called: names.append(called.name)):
        yield names
