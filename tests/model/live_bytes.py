"""How many bytes of tensors are alive while a model takes its weights, at the most."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class LoadMemory:
    """Bytes of tensors on one rank.

    Attributes:
        before: the model's parameters, empty.
        peak: at the worst moment of `load_weights`.
        after: the model as its kernels read it.
        layer: the routed experts of one layer.
        tensor: the largest tensor of the checkpoint.
    """

    before: int
    peak: int
    after: int
    layer: int
    tensor: int


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations read or make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor):
                self.note(value)
        return result

    def note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def measured(load_weights: Any, memory: list[LoadMemory]) -> Any:
    """`load_weights` of a model class, which appends what it took to `memory`."""

    def load(model: Any, weights: Any) -> None:
        live, largest = LiveBytes(), 0

        def stream() -> Any:
            nonlocal largest
            for name, tensor in weights:
                largest = max(largest, tensor.nbytes)
                yield name, tensor
                del tensor

        for parameter in model.parameters():
            live.note(parameter)
        before = live.now
        experts = next(layer.moe.experts for layer in model.language_model.model.layers[1:])
        layer = sum(parameter.nbytes for parameter in experts.parameters())
        del parameter
        with live:
            load_weights(model, stream())
        memory.append(LoadMemory(before, live.peak, live.now, layer, largest))

    return load
