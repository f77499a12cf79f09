"""Runs cells within a budget: the most telling first, checked before timed, each kept at once."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.harness.cells import GIB, Cell, Subject, Trial
from benchmarks.harness.hardware import Machine
from benchmarks.harness.limits import Measured
from benchmarks.harness.results import (
    FAILED,
    MEASURED,
    TOO_BIG,
    UNCHECKED,
    WRONG,
    Result,
    Store,
    key_of,
)
from benchmarks.harness.timing import Call, Timing, time_calls
from step37_kernels.launch import counted


def parse_budget(text: str) -> float:
    """Seconds of "90s", "8m" or "1.5h".

    Raises:
        ValueError: text is something else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None:
        raise ValueError(f"--budget is {text!r}, expected for example 90s, 8m or 1.5h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


@dataclass(frozen=True)
class Job:
    """One cell by one implementation."""

    cell: Cell
    subject: Subject


def ordered(cells: Sequence[Cell], subjects: Sequence[Subject]) -> list[Job]:
    """All jobs, most telling first; inside a priority those that share prepared data together."""
    jobs = [Job(c, s) for c in cells for s in subjects if s.refuses(c) is None]
    rank = {subject.name: place for place, subject in enumerate(subjects)}
    return sorted(jobs, key=lambda j: (j.cell.priority, j.cell.group, rank[j.subject.name]))


@dataclass
class Run:
    """One run of a benchmark on the current CUDA device.

    Args:
        store: where results go, and what is already there.
        machine, limits: recorded in each result.
        deadline: `clock` value after which no further cell is begun.
        refcheck: compare with the reference; without it a time is marked as not checked.
        timer, clock, kernels: `time_calls`, seconds, and the count of a call's kernels, which
            tests replace.
    """

    store: Store
    machine: Machine
    limits: Measured
    deadline: float
    refcheck: bool = True
    timer: Callable[[Sequence[Call], bool], Timing] = time_calls
    clock: Callable[[], float] = time.monotonic
    kernels: Callable[[Call], int | None] | None = None

    def over(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Result | None]]:
        """Run the jobs and yield each with its result; None where the time was up before it."""
        held: _Held = _Held()
        longest = 0.0
        for job in jobs:
            if self.store.has(self._key(job)):
                continue
            begun = self.clock()
            if begun + longest > self.deadline:
                yield job, None
                continue
            result = self._result(job, held)
            longest = max(longest, self.clock() - begun)
            self.store.add(result)
            if result.status == FAILED and torch.cuda.is_available():
                torch.cuda.synchronize()  # raises if the fault took the GPU's context with it
            yield job, result

    def _key(self, job: Job) -> str:
        return key_of(job.cell, job.subject.name, job.subject.version(), self.machine)

    def _result(self, job: Job, held: _Held) -> Result:
        cell, subject = job.cell, job.subject
        empty = Result(
            cell.suite, cell.operation, cell.settings, subject.name, subject.version(), FAILED,
            asdict(self.machine), asdict(self.limits),
        )  # fmt: skip
        if self.machine.memory_bytes and cell.memory > 0.95 * self.machine.memory_bytes:
            have, need = self.machine.memory_bytes / GIB, cell.memory / GIB
            return replace(empty, status=TOO_BIG, reason=f"{need:.0f} GiB of {have:.0f}")
        try:
            return self._measured(empty, subject.trial(held.prepared(job), cell))
        except torch.OutOfMemoryError as error:
            failure = replace(empty, status=TOO_BIG, reason=str(error).split(". ")[0])
        except Exception as error:  # a peer may fail in any way; the other cells go on
            failure = replace(empty, reason=f"{type(error).__name__}: {error}"[:300])
        held.clear()  # here, where the exception no longer holds the tensors of its frames
        return failure

    def _measured(self, empty: Result, trial: Trial) -> Result:
        status, accuracy = UNCHECKED, None
        if self.refcheck:
            found = trial.check()
            status, accuracy = MEASURED, asdict(found)
            if not found.holds:
                reason = f"relative L2 {found.relative_l2:.3g}, at most {found.allowed:.3g}"
                return replace(empty, status=WRONG, reason=reason, accuracy=accuracy)
        ours = empty.implementation == "step37"
        with counted() as names:
            trial.calls[0]()
        return replace(
            empty,
            status=status,
            accuracy=accuracy,
            time_us=asdict(self.timer(trial.calls, trial.graph)),
            work=asdict(trial.work),
            launches=list(names) if ours else None,
            device_kernels=(self.kernels or profiled_kernels)(trial.calls[0]),
        )


class _Held:
    """The prepared data of one group by one implementation: there is memory for one at a time."""

    def __init__(self) -> None:
        self._of: tuple[str, str] | None = None
        self._data: Any = None

    def prepared(self, job: Job) -> Any:
        wanted = (job.cell.group, job.subject.name)
        if self._of != wanted:
            self.clear()
            self._data, self._of = job.subject.prepare(job.cell), wanted
        return self._data

    def clear(self) -> None:
        self._of = self._data = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def profiled_kernels(call: Call) -> int | None:
    """Kernels, copies and fills that one call starts on the device; None without a profiler."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
    except RuntimeError:
        return None
    device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == device for event in profile.events()) or None
