"""What the machine code of a shipped configuration has to keep to, and the check of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from step37_kernels.arch import assumed_arch
from step37_kernels.evidence.machine_code import ALU, Kernel, Loop, compile_launches
from step37_kernels.launch import Launch, observed

BYTES_IN_FLIGHT = 32 * 1024
"""Little's law for an H100: 3.35 TB/s x 700 ns / 132 SMs is 18 KB at the least; near twice that."""

# Spilled tiles, values passed through shared memory one by one, synchronous loads, slow converts.
LOOP_FORBIDS = ("STS", "LDG", "F2F", "I2F", "LDL", "STL")
_OUTSIDE_LOOPS = ("STS", "LDG")  # what a program does before and after its loop anyway


@dataclass(frozen=True)
class Limits:
    """Bounds on one kernel's machine code; what is None or empty is not asked.

    Attributes:
        reason: why these numbers, in a sentence.
        tensor_core: the opcode that has to do the multiplications, for example "HGMMA".
        blocks_per_sm: resident blocks that registers and shared memory have to allow.
        units: weights or bytes of one trip of the main loop over the whole block.
        per_unit: at most so many lane instructions per unit in the main loop.
        alu_per_unit: of these at most so many integer and logic ones.
        loop_forbids: opcodes that may not stand in the main loop.
        async_copies: whether tiles have to be copied asynchronously.
        bytes_in_flight: at least so many bytes on their way per SM.
        unrolled_units: units of a whole program; where the compiler has unrolled the main loop
            away, the limits per unit count all instructions against these.
    """

    reason: str
    tensor_core: str = ""
    blocks_per_sm: int = 1
    units: int | None = None
    per_unit: float | None = None
    alu_per_unit: float | None = None
    loop_forbids: tuple[str, ...] = ()
    async_copies: bool = False
    bytes_in_flight: int | None = None
    unrolled_units: int | None = None


@dataclass(frozen=True)
class Case:
    """One shipped configuration at a real shape.

    Attributes:
        name: unique, for example "nvfp4 gate-up, 64 tokens, TP=4".
        arch: 90 for sm_90 and so on.
        run: calls the operation, or its launcher, on tensors of the "meta" device.
        limits: by kernel function name; a kernel without limits is still checked for spills.
    """

    name: str
    arch: int
    run: Callable[[], Any]
    limits: dict[str, Limits]


@dataclass(frozen=True)
class Finding:
    """One compiled kernel of a case: its figures, and what is wrong with it (empty: nothing)."""

    case: str
    kernel: str
    arch: int
    figures: dict[str, Any]
    faults: list[str]


def launched(case: Case) -> list[str]:
    """Names of the kernels that a case launches; nothing is compiled."""
    names: list[str] = []
    with observed(lambda called: names.append(called.name), runs=False), assumed_arch(case.arch):
        case.run()
    return names


def examine(case: Case) -> list[Finding]:
    """Compile a case's launches and hold each kernel against its limits."""
    kernels = compile_launches(case.arch, case.run)
    absent = set(case.limits) - {kernel.name for kernel in kernels}
    if absent:
        raise ValueError(f"case {case.name!r} launches no {', '.join(sorted(absent))}")
    return [
        Finding(
            case.name, k.name, case.arch, figures(k, case.limits.get(k.name)),
            faults(k, case.limits.get(k.name)),
        )
        for k in kernels
    ]  # fmt: skip


def figures(kernel: Kernel, limits: Limits | None) -> dict[str, Any]:
    """The numbers of one kernel that a table shows."""
    found: dict[str, Any] = {
        "grid": kernel.launch.grid,
        "num_warps": kernel.num_warps,
        "registers": kernel.registers,
        "shared_bytes": kernel.shared_bytes,
        "blocks_per_sm": kernel.blocks_per_sm,
        "spills": kernel.spills,
        "tensor_core": sorted(kernel.tensor_core),
        "async_copies": kernel.async_copies,
        "bytes_in_flight": kernel.bytes_in_flight,
    }
    loop, units = _counted(kernel, limits) if limits is not None else (None, None)
    if loop is not None and units is not None:
        found["per_unit"] = round(loop.per(units), 2)
        found["alu_per_unit"] = round(loop.per(units, ALU), 2)
        found["loop"] = dict(loop.opcodes().most_common())
    return found


def faults(kernel: Kernel, limits: Limits | None) -> list[str]:
    """What is wrong with a kernel, one sentence each."""
    wrong = [f"{kernel.spills} spills to local memory"] if kernel.spills else []
    wrong += [f"{name} is specialised on its value" for name in specialised(kernel.launch)]
    if limits is None:
        return wrong
    if limits.tensor_core and not any(o.startswith(limits.tensor_core) for o in kernel.tensor_core):
        wrong.append(f"no {limits.tensor_core}, only {sorted(kernel.tensor_core)}")
    if kernel.blocks_per_sm < limits.blocks_per_sm:
        wrong.append(f"{kernel.blocks_per_sm} blocks per SM, at least {limits.blocks_per_sm}")
    if limits.async_copies and not kernel.async_copies:
        wrong.append("no asynchronous copies")
    wanted = limits.bytes_in_flight
    if wanted is not None and kernel.bytes_in_flight < wanted:
        wrong.append(f"{kernel.bytes_in_flight} bytes in flight per SM, at least {wanted}")
    return wrong + _loop_faults(kernel, limits)


def specialised(launch: Launch) -> list[str]:
    """Integers that a kernel would be compiled anew for, by whether they are 1 or divide by 16.

    Counts change from batch to batch, and each compilation would hold a request up for seconds.
    Strides do not, or only by multiples of 16, and their divisibility makes copies asynchronous.
    """
    return [
        parameter.name
        for parameter, value in zip(launch.kernel.params, launch.args, strict=False)
        if isinstance(value, int)
        and not parameter.is_constexpr
        and not parameter.do_not_specialize
        and not parameter.name.endswith("stride")
    ]


def _counted(kernel: Kernel, limits: Limits) -> tuple[Loop | None, int | None]:
    """What the limits per unit are held against, and its units."""
    if kernel.main_loop is None and limits.unrolled_units is not None:
        return Loop(kernel.instructions, kernel.num_warps), limits.unrolled_units
    return kernel.main_loop, limits.units


def _loop_faults(kernel: Kernel, limits: Limits) -> list[str]:
    asked = limits.per_unit is not None or limits.alu_per_unit is not None or limits.loop_forbids
    if not asked:
        return []
    loop, units = _counted(kernel, limits)
    if loop is None:
        return ["no loop with a tensor-core instruction"]
    unrolled = loop is not kernel.main_loop
    wrong = [
        f"{loop.count(opcode)} {opcode} in the main loop"
        for opcode in limits.loop_forbids
        if loop.count(opcode + r"\b") and not (unrolled and opcode in _OUTSIDE_LOOPS)
    ]
    for what, pattern, most in (
        ("instructions", "", limits.per_unit),
        ("ALU instructions", ALU, limits.alu_per_unit),
    ):
        if most is not None:
            assert units is not None, "a limit per unit needs the number of units"
            if loop.per(units, pattern) > most:
                have = loop.per(units, pattern)
                wrong.append(f"{have:.2f} {what} per unit in the main loop, at most {most}")
    return wrong
