"""Compile what the launchers launch for any NVIDIA architecture, with no GPU, and read the SASS.

Triton brings ptxas, cuobjdump and nvdisasm. With a driver object that only knows an architecture,
`kernel.warmup` specialises its arguments as a real launch would and compiles; nothing runs. This
needs a process in which the interpreter is off.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from step37_kernels.arch import assumed_arch
from step37_kernels.launch import Launch, observed

WARP = 32
REGISTERS_PER_SM = 65536
SHARED_BYTES_PER_SM = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What a block may use; an SM has 1 KB more for each resident block (CUDA programming guide)."""
MAX_WARPS_PER_SM = 64

TENSOR_CORE = re.compile(r"^(HGMMA|QGMMA|HMMA|QMMA|OMMA|UTCHMMA|UTCQMMA|UTCOMMA)")
LOCAL_MEMORY = re.compile(r"^(LDL|STL)")
ASYNC_COPY = re.compile(r"^(LDGSTS|UTMALDG|UBLKCP)")
# Integer and logic instructions, modelled at half the issue rate (64 lanes a clock and SM).
ALU = re.compile(
    r"^(LOP3|SHF|PRMT|IADD3|ISETP|SEL|FSEL|FMNMX|FSETP|LEA|F2FP|VIADD|VIMNMX|PLOP3|IABS|I2IP|SHL|"
    r"SHR|LOP|I2FP|P2R|R2P|MOV|HMNMX2|VOTE)"
)


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction: `HGMMA`, and the rest of its line."""

    opcode: str
    operands: str


@dataclass(frozen=True)
class Kernel:
    """One compiled launch.

    Attributes:
        launch: what was launched.
        arch: 90 for sm_90 and so on.
        registers: per thread.
        shared_bytes: per block.
        num_warps: per block.
        instructions: the whole program in order.
        loops: (first, last) index of every loop.
        ttgir: Triton's intermediate code, in which pipeline buffers can be counted.
    """

    launch: Launch
    arch: int
    registers: int
    shared_bytes: int
    num_warps: int
    instructions: tuple[Instruction, ...]
    loops: tuple[tuple[int, int], ...]
    ttgir: str

    @property
    def name(self) -> str:
        """The kernel function's name."""
        return self.launch.name

    def count(self, pattern: str | re.Pattern[str]) -> int:
        """Instructions of the whole program whose opcode begins with `pattern`."""
        return sum(bool(re.match(pattern, i.opcode)) for i in self.instructions)

    @property
    def spills(self) -> int:
        """Local-memory loads and stores."""
        return self.count(LOCAL_MEMORY)

    @property
    def tensor_core(self) -> frozenset[str]:
        """Which tensor-core instructions it has."""
        return frozenset(i.opcode for i in self.instructions if TENSOR_CORE.match(i.opcode))

    @property
    def async_copies(self) -> int:
        """Asynchronous copies from global to shared memory."""
        return self.count(ASYNC_COPY)

    @property
    def blocks_per_sm(self) -> int:
        """Resident blocks that registers, shared memory and warps allow."""
        threads = self.num_warps * WARP
        allocated = -(-max(self.registers, 1) // 8) * 8 * threads  # in units of 8 a thread
        by_registers = REGISTERS_PER_SM // allocated
        by_shared = SHARED_BYTES_PER_SM[self.arch] // max(self.shared_bytes + 1024, 1)
        return min(by_registers, by_shared, MAX_WARPS_PER_SM // self.num_warps, 32)

    @property
    def bytes_in_flight(self) -> int:
        """Bytes per SM that the copy pipeline keeps on their way while a tile is computed.

        Of b buffers one is being read, so b - 1 tiles are in flight in each resident block.
        """
        per_block = sum((buffers - 1) * size for buffers, size in pipeline_buffers(self.ttgir))
        return per_block * self.blocks_per_sm

    @cached_property
    def main_loop(self) -> Loop | None:
        """The shortest loop that holds a tensor-core instruction; None if there is none."""
        bodies = [self.instructions[first : last + 1] for first, last in self.loops]
        bodies = [body for body in bodies if any(TENSOR_CORE.match(i.opcode) for i in body)]
        return Loop(min(bodies, key=len), self.num_warps) if bodies else None


@dataclass(frozen=True)
class Loop:
    """A loop's body as every warp of the block runs it."""

    body: tuple[Instruction, ...]
    num_warps: int

    def count(self, pattern: str | re.Pattern[str]) -> int:
        """Instructions of one warp whose opcode begins with `pattern`."""
        return sum(bool(re.match(pattern, i.opcode)) for i in self.body)

    def opcodes(self) -> Counter[str]:
        """How often each opcode stands in the body."""
        return Counter(i.opcode for i in self.body)

    def per(self, units: int, pattern: str | re.Pattern[str] = "") -> float:
        """Lane instructions per unit (weight, byte), `units` being one trip of the whole block."""
        return self.count(pattern) * self.num_warps * WARP / units


class _Driver(DriverBase):
    """What Triton asks of a driver before a launch, answered for an architecture alone."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, WARP)
        self.utils = self

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # compiled kernels are kept by device: one device an architecture

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int = 0) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES_PER_SM[self.target.arch]}

    def get_benchmarker(self) -> Callable[..., list[float]]:
        raise NotImplementedError("nothing runs without a GPU")


def compile_launches(arch: int, run: Callable[[], Any]) -> list[Kernel]:
    """Compile for `arch` every kernel that `run` launches, in order; nothing is executed.

    `run` may pass tensors on the "meta" device: only types and alignment matter.

    Raises:
        RuntimeError: the interpreter is on in this process.
        ValueError: the architecture is not known here.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("machine code cannot be made in a process where the interpreter is on")
    if arch not in SHARED_BYTES_PER_SM:
        raise ValueError(f"arch is {arch}, expected one of {sorted(SHARED_BYTES_PER_SM)}")
    launches: list[Launch] = []
    with observed(launches.append, runs=False), assumed_arch(arch):
        run()
    triton.runtime.driver.set_active(_Driver(arch))
    return [_compile(called, arch) for called in launches]


def _compile(called: Launch, arch: int) -> Kernel:
    compiled = called.kernel.warmup(*called.args, grid=called.grid, **called.options)
    sass = _nvidia_tool("nvdisasm", "-c", compiled.asm["cubin"])
    usage = _nvidia_tool("cuobjdump", "--dump-resource-usage", compiled.asm["cubin"])
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    instructions, loops = parse_sass(sass)
    return Kernel(
        called,
        arch,
        int(registers[1]),
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        instructions,
        loops,
        compiled.asm["ttgir"],
    )


def _nvidia_tool(name: str, flag: str, cubin: bytes) -> str:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(folder / name), flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse_sass(text: str) -> tuple[tuple[Instruction, ...], tuple[tuple[int, int], ...]]:
    """Instructions of nvdisasm's output, and the loops: branches to a label above them.

    What stands after the last EXIT are cold paths, such as the repeated wait for a barrier, which
    branch back into the program without being a loop over it.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(r"^(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(
            r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)([^;]*);", line
        ):
            if target := re.search(r"`\((\.L\w+)\)", found[2]):
                branches.append((len(instructions), target[1]))
            instructions.append(Instruction(found[1], found[2]))
    end = max((at for at, i in enumerate(instructions) if i.opcode == "EXIT"), default=0)
    loops = tuple(
        (labels[label], at)
        for at, label in branches
        if label in labels and labels[label] <= at < end
        if instructions[at].opcode in ("BRA", "UBRA")
    )
    return tuple(instructions), loops


def pipeline_buffers(ttgir: str) -> list[tuple[int, int]]:
    """(number of buffers, bytes of one) of each multi-buffered shared-memory allocation.

    Counted in the code and not taken from num_stages: behind an indirect address the compiler
    makes fewer.
    """
    found = []
    for line in ttgir.splitlines():
        if "ttg.local_alloc" not in line:
            continue
        shape = re.search(r"!ttg\.memdesc<((?:\d+x)+)([a-zA-Z]+\d*\w*)", line.rsplit("->", 1)[-1])
        if shape is None:
            continue
        buffers, *tile = [int(size) for size in shape[1].rstrip("x").split("x")]
        if len(tile) < 2 or buffers < 2:
            continue
        bits = 8 if shape[2].startswith("f8") else int(re.sub(r"\D", "", shape[2]))
        found.append((buffers, math.prod(tile) * bits // 8))
    return found
