"""Shipped configurations of the expert layer, with the limits of their machine code."""

from __future__ import annotations

from step37_kernels.evidence import dense_cases, nvfp4_cases, routing_cases
from step37_kernels.evidence.limits import Case


def cases() -> list[Case]:
    """One case per format, shape and architecture that the tile policy tells apart."""
    return [*routing_cases.cases(), *dense_cases.cases(), *nvfp4_cases.cases()]
