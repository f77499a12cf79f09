"""The architecture that tiles are chosen for: the device's, or an assumed one off a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

_assumed: ContextVar[int] = ContextVar("assumed_arch", default=90)


def arch_of(tensor: Tensor) -> int:
    """90 for sm_90 and so on; off a GPU what `assumed_arch` says, or 90."""
    return _capability(tensor.device) if tensor.is_cuda else _assumed.get()


@contextmanager
def assumed_arch(arch: int) -> Iterator[None]:
    """Choose tiles for `arch` inside the block, for tensors that are on no GPU."""
    token = _assumed.set(arch)
    try:
        yield
    finally:
        _assumed.reset(token)


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
