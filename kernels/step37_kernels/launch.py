"""The one way a Triton kernel is launched here, so that launches can be counted or compiled."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


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

    def variant(self) -> tuple[Hashable, ...]:
        """What Triton compiles the kernel for: launches that agree in it share one compilation.

        Its rule, of `JITFunction.run`: constants by their value, tensors by type and by whether
        they begin at a multiple of 16 bytes, integers by whether they are 1 or a multiple of 16
        unless the kernel says that they do not matter, other numbers by their type.
        """
        given = zip(self.kernel.params, self.args, strict=False)
        classes = tuple(_class_of(value, not p.do_not_specialize) for p, value in given)
        return (self.name, classes, tuple(sorted(self.options.items())))


def _class_of(value: Any, specialised: bool) -> Hashable:
    if isinstance(value, torch.Tensor):
        return value.dtype, specialised and value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        wide = not -(2**31) <= value < 2**31
        return (wide, value == 1, value % 16 == 0) if specialised else wide
    return None if value is None else type(value).__name__


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
