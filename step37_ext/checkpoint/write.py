"""Writing a checkpoint folder: sharded safetensors with an index, all or nothing."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

_SHARDS = 3


def require_free(out: Path) -> None:
    """Check that a folder can be written at `out`.

    Raises:
        ValueError: `out` is a file, or a folder that is not empty.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"output {out}: is a file; name a new or empty folder")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"output {out}: is not empty; name a new or empty folder")


@contextmanager
def folder_at_once(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, renamed to `out` at the end, or removed after an error.

    Raises:
        ValueError: as `require_free`.
    """
    require_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, out)  # on POSIX, also onto an empty folder
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` into shards of about equal size and `model.safetensors.index.json`.

    The layout is the Hugging Face hub's: `model-0000i-of-0000n.safetensors`, and an index with
    `metadata.total_size` in bytes and `weight_map` from tensor name to file.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(_SHARDS)]
    before = 0
    for name, tensor in tensors.items():
        shards[before * _SHARDS // total][name] = tensor.contiguous()
        before += tensor.nbytes
    shards = [shard for shard in shards if shard]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors writes 0600; a server may run as another user
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented UTF-8 JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
