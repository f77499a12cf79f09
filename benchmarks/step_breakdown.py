"""Where a step's time goes: device time by kernel, and what is left outside all kernels."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

OUTSIDE = "outside kernels"
_REPLAYS = 5


@dataclass(frozen=True)
class Span:
    """One kernel (copy, fill) on the device, in microseconds."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class Row:
    """All launches of one kernel in a step, and their microseconds."""

    name: str
    launches: int
    us: float


def profiled(run: Callable[[], Any]) -> list[Row]:
    """Run a step a few times under the profiler and divide the middle one.

    Args:
        run: one step; a replay of its graph, or its launches one by one.

    Raises:
        RuntimeError: the profiler did not see the same launches in every step.
    """
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(_REPLAYS):
            run()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == device
    ]
    return divided(spans, _REPLAYS)


def divided(spans: Sequence[Span], replays: int) -> list[Row]:
    """The middle one of several steps as rows that add up to its period, the longest first.

    The period lasts from a step's first kernel to the next step's, so that what the device waits
    between them is in it. Where kernels overlap, the time counts for the one that began first.

    Raises:
        RuntimeError: the spans are not the same kernels `replays` times over.
    """
    ordered = sorted(spans, key=lambda span: span.begin)
    count = len(ordered) // replays
    steps = [ordered[at : at + count] for at in range(0, len(ordered), max(1, count))]
    names = [[span.name for span in step] for step in steps]
    if not count or len(ordered) % replays or any(one != names[0] for one in names):
        raise RuntimeError(
            f"the profiler saw {len(ordered)} launches in {replays} steps, not the same in each"
        )
    middle = replays // 2
    step, end = steps[middle], steps[middle + 1][0].begin
    launches: dict[str, int] = {}
    times: dict[str, float] = {}
    covered = step[0].begin
    for span in step:
        name = short(span.name)
        launches[name] = launches.get(name, 0) + 1
        times[name] = times.get(name, 0.0) + max(0.0, min(span.end, end) - max(span.begin, covered))
        covered = max(covered, min(span.end, end))
    rows = [Row(name, launches[name], us) for name, us in times.items()]
    rows.sort(key=lambda row: -row.us)
    return [*rows, Row(OUTSIDE, 0, end - step[0].begin - sum(times.values()))]


def short(name: str) -> str:
    """A kernel's name without its C++ result type, template arguments and parameters."""
    plain = re.split(r"[<(]", name.removeprefix("void "), maxsplit=1)[0]
    return plain.strip() or name
