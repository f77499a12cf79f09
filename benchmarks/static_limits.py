"""What a kernel's machine code allows: the bandwidth by its issue slots and its bytes in flight.

Two upper bounds that need no GPU. An SM issues 128 lane instructions a clock, so that a loop of i
instructions a byte streams at most 128 / i bytes a clock. And by Little's law the bytes on their
way are bandwidth times latency: of b tiles that a block keeps, one is read while b - 1 are on their
way; at the most, between two trips, all b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from step37_ext.deploy.data_sheets import DATA_SHEETS, DataSheet

LANES = 128  # of an SM's four schedulers
LATENCY = 700e-9  # seconds from asking to having, assumed; not in a data sheet


@dataclass(frozen=True)
class Chip:
    """What the bounds need of a GPU beside its data sheet: SMs, and the clock assumed under load.

    Numbers of SMs from NVIDIA's architecture papers (GH100 SXM5; GB100 as B200 has it).
    """

    sheet: DataSheet
    sms: int
    clock: float


CHIPS = {90: Chip(DATA_SHEETS["H200"], 132, 1.75e9), 100: Chip(DATA_SHEETS["B200"], 148, 1.86e9)}
"""The GPU of each architecture that the bounds are shares of."""


@dataclass(frozen=True)
class Bounds:
    """Shares of the data sheet's bandwidth that one kernel cannot exceed.

    Attributes:
        issue: by its instructions.
        in_flight: by its bytes in flight while it computes, and at the most.
        kib_in_flight: per SM, the same two.
    """

    issue: float
    in_flight: tuple[float, float]
    kib_in_flight: tuple[float, float]

    @property
    def verdict(self) -> str:
        """What bounds it, or "memory" where these two leave all of the bandwidth."""
        least = min(self.issue, self.in_flight[1])
        if least >= 1:
            return "memory" if self.in_flight[0] >= 1 else "memory, if blocks overlap"
        return "issue slots" if self.issue == least else "bytes in flight"


def bounds(row: Mapping[str, Any]) -> Bounds:
    """The bounds of one row of `benchmarks.static_comparison`."""
    chip = CHIPS[row["arch"]]
    per_sm = chip.sheet.bandwidth / chip.sms
    resident = min(row["blocks_per_sm"], row["programs"] / chip.sms)
    busy = min(1.0, resident)  # share of the SMs that have a block at all
    tile = row["trip_bytes"] * resident
    flight = ((row["buffers"] - 1) * tile, row["buffers"] * tile)
    return Bounds(
        busy * LANES / row["instructions"] * chip.clock / per_sm,
        (flight[0] / LATENCY / per_sm, flight[1] / LATENCY / per_sm),
        (flight[0] / 1024, flight[1] / 1024),
    )
