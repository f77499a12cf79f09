"""Writing a safetensors file piece by piece, and checking one that was written before.

The format (huggingface/safetensors, README): 8 bytes with the header's length, little-endian; the
header as JSON, padded with spaces to a multiple of 8; the tensors' bytes without gaps. Tensors are
ordered as the library orders them, by falling alignment and then by name, so that the same tensors
make the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from step37_ext.quantize.plan import ELEMENT_BYTES, Stored

_READ_BYTES = 16 * 2**20


def layout(tensors: Sequence[Stored]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Header bytes (length field included) and each tensor's first and past-the-end file offset."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    spans: dict[str, tuple[int, int]] = {}
    begin = 0
    for tensor in sorted(tensors, key=lambda t: (-ELEMENT_BYTES[t.dtype], t.dtype, t.name)):
        spans[tensor.name] = (begin, begin + tensor.nbytes)
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": list(spans[tensor.name]),
        }
        begin += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: (len(head) + a, len(head) + b) for name, (a, b) in spans.items()}


def file_bytes(tensors: Sequence[Stored]) -> int:
    """Size of the file that holds `tensors`."""
    return len(layout(tensors)[0]) + sum(tensor.nbytes for tensor in tensors)


class ShardWriter:
    """Fills a new file at `path`; a tensor's pieces come in order, tensors in any.

    Use as a context manager. `digests()` gives the SHA-256 of each tensor's bytes.
    """

    def __init__(self, path: Path, tensors: Sequence[Stored]) -> None:
        self._path = path
        self._head, self._spans = layout(tensors)
        self._at = {name: begin for name, (begin, _) in self._spans.items()}
        self._hashes = {name: hashlib.sha256() for name in self._spans}

    def __enter__(self) -> ShardWriter:
        self._file = self._path.open("wb")
        self._file.write(self._head)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, name: str, piece: Tensor) -> int:
        """Write the next piece of tensor `name`; returns its number of bytes."""
        data = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._file.seek(self._at[name])
        self._file.write(data)
        self._hashes[name].update(data)
        self._at[name] += len(data)
        return len(data)

    def digests(self) -> dict[str, str]:
        """SHA-256 by tensor name.

        Raises:
            ValueError: a tensor has got more or fewer bytes than its header promises.
        """
        for name, (begin, end) in self._spans.items():
            if self._at[name] != end:
                raise ValueError(
                    f"{name}: {self._at[name] - begin} bytes written, expected {end - begin}"
                )
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}


def is_intact(path: Path, tensors: Sequence[Stored], digests: dict[str, str]) -> bool:
    """Whether the file at `path` is, byte for byte, the one that was written."""
    head, spans = layout(tensors)
    if not path.is_file() or path.stat().st_size != file_bytes(tensors):
        return False
    with path.open("rb") as file:
        if file.read(len(head)) != head:
            return False
        for name, (begin, end) in spans.items():
            file.seek(begin, os.SEEK_SET)
            digest, left = hashlib.sha256(), end - begin
            while left:
                data = file.read(min(left, _READ_BYTES))
                digest.update(data)
                left -= len(data)
            if digest.hexdigest() != digests.get(name):
                return False
    return True
