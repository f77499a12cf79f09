"""One file of the new checkpoint: read, quantise and write, one expert's matrix at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from step37_ext.checkpoint.headers import read_json
from step37_ext.quantize.durable import replaced_at_end, write_json_durably
from step37_ext.quantize.plan import Shard, TargetFormat, Task
from step37_ext.quantize.shard_file import ShardWriter, is_intact
from step37_ext.quantize.source import Source
from step37_kernels.formats.fp8_block import quantize as quantize_fp8_block
from step37_kernels.formats.nvfp4 import quantize as quantize_nvfp4

Advance = Callable[[int], None]
"""Called with the number of bytes that have just been finished."""


@dataclass(frozen=True)
class Places:
    """Where a conversion reads and writes.

    Attributes:
        records: folder of one JSON file per finished shard.
        scales: safetensors file of the calibration's scales, if there was one.
    """

    source: Path
    output: Path
    records: Path
    scales: Path | None
    target: TargetFormat


@dataclass(frozen=True)
class StackError:
    """How far a quantised stack of experts is from its source: sums of squares, and the worst."""

    error: float
    weight: float
    worst_expert: int
    worst: float


def convert_shard(source: Source, places: Places, shard: Shard, advance: Advance) -> dict[str, Any]:
    """Write one shard, unless a run before has and its bytes are still the same.

    Returns:
        The shard's record: "digests" of its tensors, "errors" (a `StackError` as a dict) by
        canonical name, and "state", one of "written", "kept" and "damaged" (written again).

    Raises:
        ValueError: weights that are not finite, by tensor and expert.
        OSError: reading or writing failed.
    """
    path, record_path = places.output / shard.file, places.records / f"{shard.file}.json"
    state = "written"
    if record_path.is_file() and path.is_file():
        record = read_json(record_path)
        if is_intact(path, shard.outputs, record["digests"]):
            advance(sum(task.nbytes for task in shard.tasks))
            return record | {"state": "kept"}
        state = "damaged"
    errors: dict[str, Any] = {}
    with replaced_at_end(path) as partial, ShardWriter(partial, shard.outputs) as writer:
        for task in shard.tasks:
            if task.kind == "experts":
                errors[task.source] = asdict(_experts(source, task, places.target, writer, advance))
            else:
                advance(writer.append(task.outputs[0].name, _plain(source, task, places.scales)))
        digests = writer.digests()
    record = {"digests": digests, "errors": errors}
    write_json_durably(record_path, record)
    return record | {"state": state}


def _plain(source: Source, task: Task, scales: Path | None) -> Tensor:
    if task.kind == "copy":
        return source.tensor(task.source)
    assert scales is not None, task.source
    with safe_open(scales, framework="pt") as stored:
        return stored.get_tensor(task.source)


def _experts(
    source: Source, task: Task, target: TargetFormat, writer: ShardWriter, advance: Advance
) -> StackError:
    error = weight = worst = 0.0
    worst_expert = 0
    for expert in range(source.headers[task.source].shape[0]):
        matrix = source.expert(task.source, expert)
        try:
            parts, back = quantized(matrix, target)
        except ValueError as problem:
            raise ValueError(f"{task.source}, expert {expert}: {problem}") from None
        for stored, part in zip(task.outputs, parts, strict=True):
            advance(writer.append(stored.name, part))
        squared = (back - matrix).square().sum(dtype=torch.float64).item()
        norm = matrix.square().sum(dtype=torch.float64).item()
        error, weight = error + squared, weight + norm
        if (relative := relative_error(squared, norm)) > worst:
            worst_expert, worst = expert, relative
    return StackError(error, weight, worst_expert, worst)


def quantized(matrix: Tensor, target: TargetFormat) -> tuple[tuple[Tensor, ...], Tensor]:
    """A matrix fp32 [N, K] as the target format stores it, and what that stands for in fp32.

    Returns:
        The stored tensors in the order of `expected_tensors`: weight, then its scales from fine to
        coarse; and the dequantised matrix.

    Raises:
        ValueError: the matrix is not finite.
    """
    if target == "fp8":
        block = quantize_fp8_block(matrix)
        return (block.data, block.scale_inv), block.dequantize(torch.float32)
    nvfp4 = quantize_nvfp4(matrix)
    stored = (nvfp4.packed, nvfp4.block_scale, nvfp4.global_scale)
    return stored, nvfp4.dequantize(torch.float32)


def relative_error(error: float, weight: float) -> float:
    """Relative L2 error from the sums of squares of the error and of the source; 0 for 0 / 0.

    To eight digits: further ones depend on how many threads added up the squares.
    """
    return float(f"{(error / weight) ** 0.5:.8g}") if weight else 0.0
