"""The checkpoint to be quantised: its tensors by the BF16 release's names, read one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from step37_ext.checkpoint.headers import TensorHeader, read_headers
from step37_ext.model.tensors import canonical_name
from step37_kernels.formats.fp8_block import FP8BlockTensor


class Source:
    """A BF16 or FP8 checkpoint in `folder`.

    Attributes:
        headers: shape, type and file of every tensor, by canonical name.

    Raises:
        ValueError: as `read_headers`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.headers: dict[str, TensorHeader] = {}
        self._stored: dict[str, str] = {}
        for name, header in read_headers(folder).items():
            self.headers[canonical_name(name)] = header
            self._stored[canonical_name(name)] = name
        self._files: dict[str, Any] = {}

    def tensor(self, name: str) -> Tensor:
        """The whole tensor as stored."""
        return self._open(name).get_tensor(self._stored[name])

    def expert(self, name: str, expert: int) -> Tensor:
        """One matrix of a stack of experts, dequantised: fp32 [rows, columns]."""
        matrix = self._slice(name)[expert]
        if self.headers[name].dtype != "F8_E4M3":
            return matrix.float()
        scale = self._slice(f"{name}_scale_inv")[expert]
        return FP8BlockTensor(matrix, scale.float()).dequantize(torch.float32)

    def _slice(self, name: str) -> Any:
        return self._open(name).get_slice(self._stored[name])

    def _open(self, name: str) -> Any:
        """The open file that holds a tensor; files stay open, as memory maps that cost nothing."""
        file = self.headers[name].file
        if file not in self._files:
            self._files[file] = safe_open(self.folder / file, framework="pt")
        return self._files[file]
