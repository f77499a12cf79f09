"""The trained weights, made once and kept in the user's cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from step37_ext.checkpoint.dialogues import DIALOGUES
from step37_ext.checkpoint.release_layout import Calibration, tensor_shapes
from step37_ext.checkpoint.spec import TINY
from step37_ext.checkpoint.tokenizer import CHAT_TEMPLATE, build_tokenizer
from step37_ext.checkpoint.train import Recipe

_CALIBRATION = "calibration."


def cache_file(recipe: Recipe) -> Path:
    """Where the weights trained by `recipe` are kept.

    The name holds a hash of what they depend on: sizes, dialogues with their pictures, chat
    template, tokenizer and recipe, whose `version` stands for the code that trains.
    """
    recipe_of_all = {
        "spec": asdict(TINY),
        "recipe": asdict(recipe),
        "dialogues": [asdict(dialogue) for dialogue in DIALOGUES],
        "chat_template": CHAT_TEMPLATE,
        "tokenizer": build_tokenizer(TINY.vocab_size).to_str(),
    }
    digest = hashlib.sha256(json.dumps(recipe_of_all, sort_keys=True).encode()).hexdigest()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "step37_ext" / f"tiny-{digest[:16]}.safetensors"


def trained_weights(*, quiet: bool = False) -> tuple[dict[str, Tensor], Calibration]:
    """The trained model's tensors (as `tensor_shapes(TINY)`) and its calibration.

    Taken from the cache, or trained and put there. A cached file that cannot be read or does not
    hold the right tensors is replaced.

    Raises:
        RuntimeError: training ended with a wrong answer.
    """
    recipe = Recipe()
    file = cache_file(recipe)
    file.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(file):
        tensors = _read(file)
        if tensors is None:
            from step37_ext.checkpoint.teach import teach

            weights, calibration = teach(TINY, recipe, quiet=quiet)
            tensors = weights | {
                _CALIBRATION + field.name: getattr(calibration, field.name)
                for field in fields(Calibration)
            }
            _write(file, tensors)
    calibration = Calibration(
        **{field.name: tensors.pop(_CALIBRATION + field.name) for field in fields(Calibration)}
    )
    return tensors, calibration


@contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Let a second process wait for the first one's training instead of training as well."""
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(file: Path) -> dict[str, Tensor] | None:
    """The tensors of a whole cache file, in the order of `tensor_shapes`; else None."""
    if not file.is_file():
        return None
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError):
        return None
    shapes = tensor_shapes(TINY)
    scales = [_CALIBRATION + field.name for field in fields(Calibration)]
    if tensors.keys() != {*shapes, *scales}:
        return None
    if any(tuple(tensors[name].shape) != shape for name, shape in shapes.items()):
        return None
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        return None
    return {name: tensors[name] for name in (*shapes, *scales)}


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        save_file(tensors, partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
