"""Timing with CUDA graphs: one graph holds many calls on distinct data, so L2 does not flatter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ROTATED_BYTES = 4 << 30
"""At least so many bytes lie in the data that calls rotate over: 30 to 80 times an L2."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call; a sample is one replay divided by the calls in it.

    Attributes:
        median, least, p10, p90: over the samples.
        samples: replays timed.
        calls: calls in one replay.
        graph: whether a CUDA graph was replayed (else the calls were launched one by one).
    """

    median: float
    least: float
    p10: float
    p90: float
    samples: int
    calls: int
    graph: bool


def copies_needed(bytes_of_one: float) -> int:
    """Distinct copies of data of that size which together hold ROTATED_BYTES."""
    return max(1, math.ceil(ROTATED_BYTES / max(bytes_of_one, 1)))


def calls_needed(touched_bytes: float, copies: int, most: int = 256) -> int:
    """Calls of one replay: whole turns over the copies until ROTATED_BYTES or `most` calls."""
    wanted = min(most, copies_needed(touched_bytes))
    return copies * math.ceil(wanted / copies)


def summarize(samples: Sequence[float], calls: int, graph: bool) -> Timing:
    """Timing of replays that took `samples` microseconds each."""
    each = sorted(sample / calls for sample in samples)

    def quantile(share: float) -> float:
        position = share * (len(each) - 1)
        low = math.floor(position)
        high = min(low + 1, len(each) - 1)
        return each[low] + (position - low) * (each[high] - each[low])

    return Timing(quantile(0.5), each[0], quantile(0.1), quantile(0.9), len(each), calls, graph)


def time_calls(calls: Sequence[Call], graph: bool = True, seconds: float = 0.3) -> Timing:
    """Time `calls` on the current CUDA device, all of them once per sample.

    The calls run once before anything is timed, so that kernels are compiled; with `graph` they
    are then captured, which needs them to be free of host synchronisation.

    Args:
        calls: each is one run of the operation on its own data.
        graph: replay a CUDA graph; False launches the calls one by one.
        seconds: about so long is measured, with 10 to 200 samples.
    """
    run = captured(calls) if graph else lambda: _run_all(calls)
    for _ in range(2):
        run()
    pilot = _elapsed(run, 1)[0]
    samples = _elapsed(run, max(10, min(200, round(seconds * 1e6 / max(pilot, 1.0)))))
    return summarize(samples, len(calls), graph)


def _run_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def captured(calls: Sequence[Call]) -> Callable[[], None]:
    """What replays one CUDA graph of all `calls`, which have run once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _run_all(calls)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run_all(calls)
    return graph.replay


def _elapsed(run: Callable[[], None], times: int) -> list[float]:
    """Microseconds of each of `times` runs."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 for a, b in zip(events, events[1:], strict=False)]
