"""Which machine and which code a result belongs to."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).parents[2]
SOURCES = ("kernels/step37_kernels", "benchmarks", "step37_ext/model", "step37_ext/deploy")
_DECIDE_NO_TIME = (  # what is said of times, what is not timed here, and `step37 command`
    *(f"benchmarks/{name}.py" for name in ("render", "serving", "predictions", "measurements")),
    *("benchmarks/*_report.py", "benchmarks/*_accuracy.py", "benchmarks/static_*.py"),
    *(f"benchmarks/harness/{name}.py" for name in ("report", "plot", "static")),
    "benchmarks/step_tiny.py",
    "kernels/step37_kernels/evidence/*.py",
    *(f"step37_ext/deploy/{name}.py" for name in ("report", "cli", "command", "estimate", "plans")),
)


@dataclass(frozen=True)
class Machine:
    """What a result was measured on and with; recorded in every result.

    Attributes:
        device, arch: the GPU's name and compute capability ("cpu" and 0 without one).
        sms, memory_bytes: of the GPU.
        clocks: what nvidia-smi says of driver, clocks and power, empty where it is not there.
        versions: torch, triton, cuda and python.
        commit: the git commit, "+" after it where files differ from it; None outside a repository.
        source: a hash over the kernels' and the benchmarks' Python files.
        command: the command line.
    """

    device: str
    arch: int
    sms: int
    memory_bytes: int
    clocks: dict[str, str]
    versions: dict[str, str]
    commit: str | None
    source: str
    command: list[str] = field(default_factory=list)


def describe() -> Machine:
    """This machine, its GPU (the current CUDA device) and this checkout."""
    versions = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
    }
    device, arch, sms, memory, clocks = "cpu", 0, 0, 0, {}
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        device, arch = found.name, 10 * found.major + found.minor
        sms, memory = found.multi_processor_count, found.total_memory
        clocks = _nvidia_smi(f"GPU-{found.uuid}")
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return Machine(
        device, arch, sms, memory, clocks, versions, _commit(), source_hash(), command
    )  # fmt: skip


def source_hash(
    folders: tuple[str, ...] = SOURCES, without: tuple[str, ...] = _DECIDE_NO_TIME
) -> str:
    """A hash over the Python files that decide a result, so that a change of them is a new cell."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = file.relative_to(ROOT)
            if not any(map(name.match, without)):
                digest.update(str(name).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _output(*command: str) -> str | None:
    """Standard output of a command that may be missing or fail."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> str | None:
    commit = _output("git", "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("+" if _output("git", "status", "--porcelain") else "")


def _nvidia_smi(uuid: str) -> dict[str, str]:
    fields = ["driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit"]
    query = f"--query-gpu={','.join(fields)}"
    found = _output("nvidia-smi", query, "--format=csv,noheader", f"--id={uuid}")
    if not found:
        return {}
    return dict(zip(fields, (value.strip() for value in found.split(",")), strict=False))
