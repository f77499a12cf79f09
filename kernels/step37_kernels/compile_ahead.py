"""Kernels compiled before the first batch needs them: one takes seconds, and all requests wait."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch

from step37_kernels.launch import Launch, observed

MOST_TOKENS = 16384
"""No tile of a model of Step-3.7's sizes follows the number of tokens beyond it."""


def token_counts(tiles: Sequence[Callable[[int], Hashable]], most: int = MOST_TOKENS) -> list[int]:
    """Numbers of tokens, 1 among them, that between them take every tile that any number does.

    Args:
        tiles: each gives what one launch is compiled for with so many tokens.
        most: the largest number of tokens.
    """
    seen: set[tuple[int, Hashable]] = set()
    chosen: list[int] = []
    for tokens in range(1, most + 1):
        taken = {(place, tile(tokens)) for place, tile in enumerate(tiles)}
        if not chosen or not taken <= seen:
            chosen.append(tokens)
            seen |= taken
    return chosen


def on_meta(value: Any) -> Any:
    """A tensor, or an object of tensors, of the same shapes, types and strides, without memory."""
    if isinstance(value, torch.Tensor):
        shape, strides = value.shape, value.stride()
        return torch.empty_strided(shape, strides, dtype=value.dtype, device="meta")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **{name: on_meta(v) for name, v in fields.items()})
    return value


def launches_of(run: Callable[[], object]) -> dict[tuple[Hashable, ...], Launch]:
    """One launch of each variant that `run` launches, in order; nothing runs on a device.

    `run` may pass tensors on the "meta" device: only types, strides and alignment matter.
    """
    found: list[Launch] = []
    with observed(found.append, runs=False):
        run()
    return {called.variant(): called for called in found}


def compile_all(launches: Iterable[Launch]) -> None:
    """Compile each launch's kernel, or find it in Triton's cache; nothing runs.

    Raises:
        RuntimeError: one does not compile.
    """
    for called in launches:
        try:
            called.kernel.warmup(*called.args, grid=called.grid, **called.options)
        except Exception as error:
            raise RuntimeError(
                f"{called.name} does not compile with {called.options}: {error}"
            ) from error
