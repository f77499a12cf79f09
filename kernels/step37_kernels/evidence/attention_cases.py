"""Shipped configurations of the attention kernels, with the limits of their machine code."""

from __future__ import annotations

from step37_kernels.evidence import decode_cases, extend_cases
from step37_kernels.evidence.limits import Case


def cases() -> list[Case]:
    """One case per format, shape and architecture that the tile policy chooses apart."""
    return [*decode_cases.cases(), *extend_cases.cases()]
