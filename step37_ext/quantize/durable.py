"""Files that are whole or not there, also after a power cut."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from step37_ext.checkpoint.write import write_json


def partial_name(path: Path) -> Path:
    """Where a file is written before it gets its name; nothing loads it under this one."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def replaced_at_end(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`: synchronised and renamed at the end, removed after an error.

    Raises:
        OSError: writing failed, for example because the disk is full.
    """
    partial = partial_name(path)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json_durably(path: Path, value: Mapping[str, Any]) -> None:
    """`write_json`, all or nothing."""
    with replaced_at_end(path) as partial:
        write_json(partial, value)


def copy_durably(source: Path, path: Path) -> None:
    """Copy a file's bytes (of a link what it points to), all or nothing."""
    with replaced_at_end(path) as partial:
        shutil.copyfile(source, partial)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
