"""A checkpoint folder as its safetensors headers describe it, without reading any weight."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True)
class TensorHeader:
    """Shape, type (safetensors' spelling, such as "BF16") and file of one stored tensor."""

    shape: tuple[int, ...]
    dtype: str
    file: str


def read_json(path: Path) -> dict:
    """The JSON object in `path`.

    Raises:
        ValueError: the file is missing, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"checkpoint: {path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"checkpoint: {path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"checkpoint: {path} holds a {type(value).__name__}, expected an object")
    return value


def weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name to file name as the index has it; None for a checkpoint without an index."""
    path = folder / INDEX_FILE
    if not path.exists():
        return None
    mapping = read_json(path).get("weight_map")
    if not isinstance(mapping, dict):
        raise ValueError(f"checkpoint: {path} has no weight_map")
    return mapping


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of the checkpoint in `folder`, from the files' headers.

    Raises:
        ValueError: no weights, a file that the index names is missing, a file is truncated or is
            not safetensors, or the index places a tensor in a file that does not hold it.
    """
    mapping = weight_map(folder)
    if mapping is not None:
        files = sorted(set(mapping.values()))
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"checkpoint: {folder} holds no .safetensors file")
    headers: dict[str, TensorHeader] = {}
    for file in files:
        if not (folder / file).exists():
            named = f", which {INDEX_FILE} names," if mapping is not None else ""
            raise ValueError(f"checkpoint: {file}{named} is missing from {folder}")
        headers.update(_read_file(folder / file))
    for name, file in (mapping or {}).items():
        if name not in headers or headers[name].file != file:
            raise ValueError(f"checkpoint: {INDEX_FILE} places {name} in {file}: it is not there")
    return headers


def _read_file(path: Path) -> dict[str, TensorHeader]:
    try:
        with safe_open(path, framework="pt") as stored:
            slices = {name: stored.get_slice(name) for name in stored.keys()}
            return {
                name: TensorHeader(tuple(part.get_shape()), part.get_dtype(), path.name)
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(
            f"checkpoint: {path} is truncated or is not a safetensors file "
            f"({path.stat().st_size} bytes): {error}"
        ) from None
