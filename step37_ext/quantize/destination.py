"""The folder that is written: whose it is, what of it is finished, and when it is whole.

While a run is unfinished the folder has `.step37-quantize/` with the plan and a record per finished
file, and neither config.json nor an index, without which nothing takes it for a checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from step37_ext.checkpoint.headers import INDEX_FILE, read_json
from step37_ext.checkpoint.write import require_free
from step37_ext.quantize.durable import copy_durably, partial_name, write_json_durably
from step37_ext.quantize.plan import Shard
from step37_ext.quantize.shard_file import file_bytes

STATE = ".step37-quantize"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_MADE_ANEW = ("config.json", "hf_quant_config.json", INDEX_FILE)


class Destination:
    """The folder at `out` that `plan` is carried out in.

    Args:
        plan: JSON object that says what is made from what; a run goes on only where an unfinished
            one with an equal plan stopped.
    """

    def __init__(self, out: Path, plan: Mapping[str, Any]) -> None:
        self.out, self.plan = out, json.loads(json.dumps(plan))
        self.state = out / STATE
        self.records = self.state / "shards"
        self.scales = self.state / "scales.safetensors"

    def check(self) -> None:
        """Whether a run may begin or go on here; changes nothing.

        Raises:
            ValueError: `out` is a file, holds a finished checkpoint, another run's unfinished one,
                or files that no run has put there.
        """
        if (self.out / INDEX_FILE).exists():
            raise ValueError(
                f"output {self.out}: holds a finished checkpoint, which is never overwritten"
            )
        if not (self.state / "plan.json").is_file():
            if not self.out.is_dir() or any(path.name != STATE for path in self.out.iterdir()):
                require_free(self.out)
            return
        found = read_json(self.state / "plan.json")
        for key, value in self.plan.items():
            if found.get(key) != value:
                raise ValueError(
                    f"output {self.out}: holds an unfinished run with another {key}"
                    f"{_difference(found.get(key), value)}; go on with the same command, or name "
                    "a new folder"
                )

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder this run's, and no other process's meanwhile.

        Raises:
            ValueError: as `check`, or another process is at work in the folder.
        """
        self.records.mkdir(parents=True, exist_ok=True)
        with (self.state / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"output {self.out}: another step37 quantize is at work there"
                ) from None
            self.check()
            write_json_durably(self.state / "plan.json", self.plan)
            yield

    def bytes_to_write(self, shards: Sequence[Shard], small_files: Sequence[Path]) -> int:
        """What files that are not there yet need; a file of the right size counts as there."""
        sizes = {shard.file: file_bytes(shard.outputs) for shard in shards}
        sizes |= {path.name: path.stat().st_size for path in small_files}
        return sum(size for file, size in sizes.items() if not self._has(file, size))

    def _has(self, file: str, size: int) -> bool:
        path = self.out / file
        return path.is_file() and path.stat().st_size == size

    def free_bytes(self, shards: Sequence[Shard]) -> int:
        """Free space where `out` is or will be, with that of files that a killed run left half."""
        place = self.out
        while not place.exists():
            place = place.absolute().parent
        partial = [partial_name(self.out / shard.file) for shard in shards]
        overwritten = sum(path.stat().st_size for path in partial if path.is_file())
        return shutil.disk_usage(place).free + overwritten

    def finish(
        self, shards: Sequence[Shard], json_files: Mapping[str, Any], small_files: Sequence[Path]
    ) -> None:
        """Write all but the tensors, config.json and then the index last, and forget the run.

        Args:
            json_files: contents by name, in the order in which they are written.
            small_files: files of the source to copy.
        """
        for path in small_files:
            copy_durably(path, self.out / path.name)
        for name, value in json_files.items():
            write_json_durably(self.out / name, value)
        stored = [(tensor, shard.file) for shard in shards for tensor in shard.outputs]
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor, _ in stored)},
            "weight_map": dict(sorted((tensor.name, file) for tensor, file in stored)),
        }
        write_json_durably(self.out / INDEX_FILE, index)
        shutil.rmtree(self.state)


def small_files(source: Path) -> list[Path]:
    """A checkpoint's files that are the same in every format: tokenizer, templates, code, texts."""
    return sorted(
        path
        for path in source.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in _MADE_ANEW
        and not path.name.endswith(_NOT_COPIED)
    )


def _difference(found: Any, wanted: Any) -> str:
    """Short values are shown, lists of files are not."""
    if isinstance(found, str) and isinstance(wanted, str):
        return f" ({found}, here {wanted})"
    return ""
