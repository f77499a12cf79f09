"""The makers' figures of the GPUs: memory bandwidth, matrix products, links between them."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class DataSheet:
    """The maker's figures of one GPU.

    Attributes:
        bandwidth: of its memory, bytes/s.
        flops: dense FLOP/s by the type that is multiplied: "bf16", "fp8", "nvfp4".
        link: NVLink, bytes/s in each direction.
    """

    name: str
    bandwidth: float
    flops: dict[str, float]
    link: float


def _sheet(
    name: str, terabytes: float, bf16: float, fp8: float, nvfp4: float | None, nvlink: float
) -> DataSheet:
    """Figures in TB/s, TFLOP/s and, as the sheets have NVLink, GB/s of both directions together."""
    rates = {"bf16": bf16 * 1e12, "fp8": fp8 * 1e12}
    if nvfp4 is not None:
        rates["nvfp4"] = nvfp4 * 1e12
    return DataSheet(name, terabytes * 1e12, rates, nvlink / 2 * 1e9)


# By a part of the device's name, the first that fits. NVIDIA's data sheets "H100 Tensor Core GPU",
# "H200 Tensor Core GPU", "HGX B200/B300" and "GB200/GB300 NVL72", divided by the number of GPUs
# and without sparsity.
DATA_SHEETS = {
    "GB300": _sheet("GB300", 8.0, 2500, 5000, 15000, 1800),
    "B300": _sheet("B300", 8.0, 2250, 4500, 13500, 1800),
    "GB200": _sheet("GB200", 8.0, 2500, 5000, 10000, 1800),
    "B200": _sheet("B200", 8.0, 2250, 4500, 9000, 1800),
    "H200 NVL": _sheet("H200 NVL", 4.8, 835, 1671, None, 900),
    "H200": _sheet("H200", 4.8, 989, 1979, None, 900),
    "H100 PCIe": _sheet("H100 PCIe", 2.0, 756, 1513, None, 600),
    "H100 NVL": _sheet("H100 NVL", 3.9, 835, 1671, None, 600),
    "H100 80GB HBM3": _sheet("H100 SXM", 3.35, 989, 1979, None, 900),
}


def data_sheet(device_name: str) -> DataSheet | None:
    """The figures of the GPU that PyTorch calls `device_name`; None where it is not in the list.

    Names are whole words: a GH200 is no H200.
    """
    found = (sheet for name, sheet in DATA_SHEETS.items() if re.search(rf"\b{name}\b", device_name))
    return next(found, None)
