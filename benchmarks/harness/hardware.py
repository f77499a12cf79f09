"""Which machine and which code a result belongs to, and the maker's figures for the GPU."""

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


@dataclass(frozen=True)
class DataSheet:
    """The maker's figures of one GPU: bytes/s, and dense FLOP/s by multiplication type."""

    name: str
    bandwidth: float
    flops: dict[str, float]


def _sheet(name: str, terabytes: float, bf16: float, fp8: float, nvfp4: float | None) -> DataSheet:
    rates = {"bf16": bf16 * 1e12, "fp8": fp8 * 1e12}
    if nvfp4 is not None:
        rates["nvfp4"] = nvfp4 * 1e12
    return DataSheet(name, terabytes * 1e12, rates)


# By a part of the device's name, the first that fits. NVIDIA's data sheets "H100 Tensor Core GPU",
# "H200 Tensor Core GPU", "HGX B200/B300" and "GB200/GB300 NVL72", divided by the number of GPUs
# and without sparsity.
DATA_SHEETS = {
    "GB300": _sheet("GB300", 8.0, 2500, 5000, 15000),
    "B300": _sheet("B300", 8.0, 2250, 4500, 13500),
    "GB200": _sheet("GB200", 8.0, 2500, 5000, 10000),
    "B200": _sheet("B200", 8.0, 2250, 4500, 9000),
    "H200 NVL": _sheet("H200 NVL", 4.8, 835, 1671, None),
    "H200": _sheet("H200", 4.8, 989, 1979, None),
    "H100 PCIe": _sheet("H100 PCIe", 2.0, 756, 1513, None),
    "H100 NVL": _sheet("H100 NVL", 3.9, 835, 1671, None),
    "H100 80GB HBM3": _sheet("H100 SXM", 3.35, 989, 1979, None),
}


def data_sheet(device_name: str) -> DataSheet | None:
    """The figures of the GPU that PyTorch calls `device_name`; None where it is not in the list."""
    return next((sheet for part, sheet in DATA_SHEETS.items() if part in device_name), None)


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


def source_hash(folders: tuple[str, ...] = ("kernels/step37_kernels", "benchmarks")) -> str:
    """A hash over the Python files that decide a result, so that a change of them is a new cell."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
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
