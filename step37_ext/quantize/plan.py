"""What is to be written: every tensor of the new checkpoint, divided over files beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from step37_ext.checkpoint.headers import TensorHeader
from step37_ext.checkpoint.release_layout import (
    Calibration,
    is_routed_expert,
    nvfp4_name,
    static_scales,
)
from step37_ext.model.config import TextShape
from step37_ext.model.tensors import NVFP4_GROUP, cache_scale, expected_tensors

TargetFormat = Literal["fp8", "nvfp4"]
SHARD_BYTES = 5 * 10**9
"""Largest file, but for a single tensor that is larger. Small enough that what a killed run loses
is minutes, and that several processes have something to share."""

ELEMENT_BYTES = {
    "F64": 8, "I64": 8, "U64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1, "BOOL": 1,
}  # fmt: skip
"""Size of one element by safetensors' name of its type."""


@dataclass(frozen=True)
class ModelDepth:
    """`release_layout.Depth` of a checkpoint of any size."""

    layers: int
    mtp_layers: int
    moe_layers: tuple[int, ...]

    @classmethod
    def of(cls, text: TextShape) -> ModelDepth:
        moe = tuple(index for index, layer in enumerate(text.layers) if layer.is_moe)
        return cls(len(text.layers), text.num_mtp_layers, moe)


@dataclass(frozen=True)
class Stored:
    """One tensor of the new checkpoint; `dtype` in safetensors' spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class Task:
    """How tensors come about: copied, quantised from a stack of experts, or made by calibration.

    Attributes:
        source: canonical name, in the source or among the calibration's scales.
        outputs: what is written; of experts the weight, then its scales from fine to coarse.
    """

    kind: Literal["copy", "experts", "scale"]
    source: str
    outputs: tuple[Stored, ...]

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.outputs)


@dataclass(frozen=True)
class Shard:
    """One file of the new checkpoint."""

    file: str
    tasks: tuple[Task, ...]

    @property
    def outputs(self) -> list[Stored]:
        return [stored for task in self.tasks for stored in task.outputs]


def plan_shards(
    headers: Mapping[str, TensorHeader],
    text: TextShape,
    target: TargetFormat,
    calibrated: bool,
) -> list[Shard]:
    """Every tensor of the new checkpoint, in files of at most `SHARD_BYTES`.

    What is not a routed expert is copied in the type it has. Tensors are ordered by layer, however
    the source's files divide them.

    Args:
        headers: the source's tensors by canonical name.
        calibrated: whether there will be scales from calibration; they replace the source's own.

    Raises:
        ValueError: a tensor's type is not known, or a matrix has no whole NVFP4 groups.
    """
    depth = ModelDepth.of(text)
    scales = _scale_tasks(depth, text, target) if calibrated else []
    tasks = list(scales)
    for name, header in headers.items():
        if header.dtype not in ELEMENT_BYTES:
            raise ValueError(f"checkpoint: {name} in {header.file} has unknown type {header.dtype}")
        if is_routed_expert(name):
            tasks.append(_expert_task(name, header, text, target))
        elif not _replaced(name, text, bool(scales)):
            tasks.append(Task("copy", name, (Stored(name, header.dtype, header.shape),)))
    tasks.sort(key=lambda task: _natural(task.source))
    if target == "nvfp4":
        tasks = [_renamed(task, depth) for task in tasks]
    return _divided(tasks)


def _replaced(name: str, text: TextShape, calibrated: bool) -> bool:
    """Whether a tensor of the source has no place in the new checkpoint."""
    weight = name.removesuffix("_scale_inv")
    return (weight != name and is_routed_expert(weight)) or (
        calibrated and cache_scale(name, text) is not None
    )


def _expert_task(name: str, header: TensorHeader, text: TextShape, target: TargetFormat) -> Task:
    if target == "nvfp4" and header.shape[-1] % NVFP4_GROUP:
        raise ValueError(
            f"checkpoint: {name} has {header.shape[-1]} columns; NVFP4 takes multiples of "
            f"{NVFP4_GROUP}"
        )
    specs = expected_tensors(text, None, target)
    module = name.removesuffix("weight")
    outputs = (
        Stored(other, spec.dtypes[0], spec.shape)
        for other, spec in specs.items()
        if other.startswith(module)
    )
    return Task("experts", name, tuple(outputs))


def _scale_tasks(depth: ModelDepth, text: TextShape, target: TargetFormat) -> list[Task]:
    """The static scales that a checkpoint of the target format has, as yet without values."""
    one = torch.ones(depth.layers)
    each = torch.ones(len(depth.moe_layers), text.num_experts)
    return [
        Task("scale", name, (Stored(name, "F32", tuple(scale.shape)),))
        for name, scale in static_scales(depth, Calibration(one, one, each, each)).items()
        if target == "nvfp4" or cache_scale(name, text)
    ]


def _renamed(task: Task, depth: ModelDepth) -> Task:
    outputs = (Stored(nvfp4_name(s.name, depth), s.dtype, s.shape) for s in task.outputs)
    return Task(task.kind, task.source, tuple(outputs))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(int(part or 0), "") if part.isdigit() else (0, part) for part in name.split(".")]


def _divided(tasks: Sequence[Task]) -> list[Shard]:
    groups: list[list[Task]] = []
    size = 0
    for task in tasks:
        if not groups or size + task.nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(task)
        size += task.nbytes
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]
