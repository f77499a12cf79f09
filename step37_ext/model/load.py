"""How one checkpoint tensor gets into one parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Load = Callable[[torch.Tensor], None]


def whole(parameter: Any) -> Load:
    """Hand the whole tensor to the parameter's own SGLang loader, which takes the rank's part."""
    return lambda tensor: parameter.weight_loader(parameter, tensor)


def plain(parameter: torch.Tensor) -> Load:
    """Copy the tensor as it is, cast to the parameter's type."""

    def load(tensor: torch.Tensor) -> None:
        parameter.data.copy_(tensor)

    return load
