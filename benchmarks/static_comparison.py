"""Our kernels beside SGLang's Triton kernels without a GPU: what their machine code allows.

    python -m benchmarks.static_comparison [--arch 90] [--only WORD ...] [--output FILE]

Both are compiled by the same Triton at the same shapes. Takes a few minutes; needs SGLang for its
kernels. `benchmarks.render` makes the table of docs/performance.md of the file.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import triton

from benchmarks.harness.hardware import ROOT
from benchmarks.shapes import INTERMEDIATE
from step37_ext.deploy.work import BYTES_PER_WEIGHT
from step37_kernels.evidence import decode_cases, dense_cases, linear_cases, nvfp4_cases
from step37_kernels.evidence.limits import Case, figures
from step37_kernels.evidence.machine_code import (
    ALU,
    ASYNC_COPY,
    TENSOR_CORE,
    compile_launches,
    pipeline_buffers,
)

STATIC = ROOT / "benchmarks" / "results" / "static"

MIX = {  # the first that fits
    "tensor": TENSOR_CORE,
    "copies": ASYNC_COPY,
    "loads and stores": re.compile(r"^(LD|ST|ATOM|RED)"),
    "conversions": re.compile(r"^(F2F|I2F|F2I)"),
    "integer": re.compile(ALU.pattern + "|^(IMAD|SGXT)"),
    "float": re.compile(r"^(FADD|FMUL|FFMA|HADD2|HMUL2|HFMA2|MUFU|HSET|FSET)"),
    "uniform": re.compile(r"^(U(?!TC)|R2UR)"),  # of a warp as one, beside the lanes' own
    "other": re.compile(""),
}

_SHARDS = {
    f"N={INTERMEDIATE}": "TP1",
    "TP=1": "TP1",
    f"N={INTERMEDIATE // 4}": "TP4",
    "TP=4": "TP4",
}
_EXPERTS = re.compile(r"(.*)[ ](gate.up|down), (1|64) tokens, (\S+)")
_SHARED = re.compile(r"(?:fp8 )?shared expert, (?:1|64) tokens, (\S+)")
_LINEAR = re.compile(r"fp8 linear, [^=]*(?:TP=4)?, (?:1|64) tokens")
_DECODE = re.compile(r"decode, .*, page \d+, TP=1")


@dataclass(frozen=True)
class Subject:
    """One launch to compile.

    Attributes:
        by: "step37" or "SGLang".
        name: formats, step and shape, alike for both.
        case: what is launched, with the units of its loop.
        unit_bytes: bytes of memory in one unit (a weight, or a byte of keys and values).
    """

    by: str
    name: str
    case: Case
    unit_bytes: float


@dataclass(frozen=True)
class Row:
    """What one kernel's machine code says.

    Attributes:
        programs: blocks of the launch, at most: without work, some end at once.
        blocks_per_sm: resident blocks that registers, shared memory and warps allow.
        buffers: tiles of weights or keys that a block keeps; 1 where it does not copy ahead.
        trip_bytes: streamed bytes of one trip of the loop over a whole block.
        instructions: lane instructions for each streamed byte.
        mix: one warp's instructions in one trip, by class.
    """

    by: str
    name: str
    arch: int
    kernel: str
    programs: int
    num_warps: int
    registers: int
    shared_bytes: int
    spills: int
    tensor_core: list[str]
    blocks_per_sm: int
    buffers: int
    trip_bytes: float
    instructions: float
    mix: dict[str, int]


def ours(arch: int) -> Iterator[Subject]:
    """Decode's launches of this project at TP = 1 and 4, of those that evidence/ compiles."""
    dense = (case for case in dense_cases.cases() if case.arch == arch)
    for case in (*dense, *nvfp4_cases.cases()):
        found = _EXPERTS.fullmatch(case.name)
        if case.arch == arch and found and found[4] in _SHARDS and "expert" not in found[1]:
            weights, _, activations = re.sub(" x |_", " ", found[1]).partition(" ")
            activations = activations or ("fp8" if weights == "fp8" else "bf16")
            step = found[2].replace("_", "-")
            name = f"{weights} x {activations} {step}, {found[3]} tokens, {_SHARDS[found[4]]}"
            yield Subject("step37", name, case, BYTES_PER_WEIGHT[weights])
    for case in (*dense_cases.cases(), *linear_cases.cases(), *decode_cases.cases()):
        shared = _SHARED.fullmatch(case.name)
        if case.arch == arch and (
            (shared and shared[1] in _SHARDS)
            or _LINEAR.fullmatch(case.name)
            or _DECODE.fullmatch(case.name)
        ):
            # The units of attention are bytes; a shared expert that is not FP8 is BF16.
            yield Subject("step37", case.name, case, 2.0 if case.name.startswith("shared") else 1.0)


def sglangs(arch: int) -> Iterator[Subject]:
    """SGLang's launches that do the same work."""
    from benchmarks import static_peers

    for case in static_peers.cases(arch):
        weights, _, rest = case.name.partition(" ")
        if weights in BYTES_PER_WEIGHT:  # both of SGLang's kernels multiply in the weights' type
            yield Subject(
                "SGLang", f"{weights} x {weights} {rest}", case, BYTES_PER_WEIGHT[weights]
            )
        else:
            yield Subject("SGLang", case.name, case, 1.0)


def compared(subjects: Iterable[Subject]) -> Iterator[Row]:
    """Compile each subject's kernels that have a loop over streamed bytes."""
    for subject in subjects:
        for kernel in compile_launches(subject.case.arch, subject.case.run):
            limits = subject.case.limits.get(kernel.name)
            if limits is None or limits.units is None:
                continue
            found = figures(kernel, limits)
            several = f", {kernel.name}" if len(subject.case.limits) > 1 else ""
            yield Row(
                by=subject.by,
                name=subject.name + several,
                arch=kernel.arch,
                kernel=kernel.name,
                programs=math.prod(kernel.launch.grid),
                buffers=max((n for n, _ in pipeline_buffers(kernel.ttgir)), default=1),
                trip_bytes=limits.units * subject.unit_bytes,
                instructions=round(found["per_unit"] / subject.unit_bytes, 2),
                mix=mix(found["loop"]),
                **{
                    name: found[name]
                    for name in ("num_warps", "registers", "shared_bytes", "spills",
                                 "tensor_core", "blocks_per_sm")
                },
            )  # fmt: skip


def mix(opcodes: dict[str, int]) -> dict[str, int]:
    """Instructions by class."""
    counted = dict.fromkeys(MIX, 0)
    for opcode, count in opcodes.items():
        counted[next(name for name, pattern in MIX.items() if pattern.match(opcode))] += count
    return counted


def compare(architectures: Iterable[int], words: Iterable[str]) -> dict[str, object]:
    """The content of the file: versions, and a row for each kernel whose name has all `words`."""
    chosen = [
        subject
        for arch in architectures
        for subject in (*ours(arch), *sglangs(arch))
        if all(word in f"{subject.by} {subject.name}" for word in words)
    ]
    return {
        "triton": triton.__version__,
        "sglang": importlib.metadata.version("sglang"),
        "rows": [asdict(row) for row in compared(chosen)],
    }


@click.command()
@click.option("--arch", type=click.Choice(["90", "100"]), multiple=True, default=("90", "100"))
@click.option("--only", multiple=True, metavar="WORD", help="Only names with all of these.")
@click.option("--output", type=click.Path(path_type=Path), default=STATIC / "comparison.json")
def main(arch: tuple[str, ...], only: tuple[str, ...], output: Path) -> None:
    """Compile our kernels and SGLang's and keep what their machine code says."""
    content = compare([int(one) for one in arch], only)
    if not content["rows"]:
        raise click.ClickException(f"--only {' '.join(only)}: no kernel's name has all of these")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=1) + "\n")
    click.echo(f"{output}: {len(content['rows'])} kernels")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
