"""Runs cells within a budget: the most telling first, checked before timed, each kept at once."""

from __future__ import annotations

import gc
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.harness.cells import GIB, Cell, Subject, Trial
from benchmarks.harness.hardware import Machine
from benchmarks.harness.limits import Measured
from benchmarks.harness.results import (
    FAILED,
    MEASURED,
    OUT_OF_MEMORY,
    TOO_BIG,
    UNCHECKED,
    WRONG,
    Result,
    Store,
    key_of,
)
from benchmarks.harness.timing import Call, Timing, time_calls
from step37_kernels.launch import counted

_TROUBLED = (FAILED, WRONG, OUT_OF_MEMORY)
"""Tried again by every run, when all else is done."""


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

    @property
    def shares(self) -> tuple[str, ...]:
        """The same for all jobs that use the same prepared data."""
        return self.cell.suite, self.cell.group, self.subject.name


def ordered(cells: Sequence[Cell], subjects: Sequence[Subject]) -> list[Job]:
    """All jobs, most telling first; inside a priority those that share prepared data together."""
    jobs = [Job(c, s) for c in cells for s in subjects if s.refuses(c) is None]
    rank = {subject.name: place for place, subject in enumerate(subjects)}
    return sorted(jobs, key=lambda j: (j.cell.priority, j.cell.group, rank[j.subject.name]))


def merged(jobs: Iterable[Job]) -> list[Job]:
    """Jobs of several suites, each suite's ordered, by priority.

    What the last jobs of a priority have prepared the first ones of the next go on with, where both
    have such: the largest, which took longest to make. The first priority's jobs stay as they are,
    since a short run has no others.
    """
    levels: dict[int, dict[tuple[str, ...], list[Job]]] = {}
    for job in sorted(jobs, key=lambda job: job.cell.priority):
        levels.setdefault(job.cell.priority, {}).setdefault(job.shares, []).append(job)
    order: list[Job] = []
    held: tuple[str, ...] | None = None
    for level, following in zip(levels.values(), [*levels.values()][1:] + [{}], strict=True):
        kept = [data for data in level if data in following and data != held] if order else []
        last = max(kept, key=lambda data: level[data][0].cell.memory, default=None)
        # A stable sort: all others stay as they are.
        names = sorted(level, key=lambda data: (data == last) - (data == held))
        order += (job for data in names for job in level[data])
        held = names[-1]
    return order


class DeviceLostError(RuntimeError):
    """A cell took the GPU's context with it: nothing more can run in this process."""


def free_memory() -> float:
    """Bytes of the GPU that nobody holds; without a GPU there is no bound."""
    if not torch.cuda.is_available():
        return math.inf
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@dataclass
class Run:
    """One run of a benchmark on the current CUDA device.

    Args:
        store: where results go, and what is already there.
        machine, limits: recorded in each result.
        deadline: `clock` value after which no further cell is begun.
        refcheck: compare with the reference; without it a time is marked as not checked.
        timer, clock, kernels, free: `time_calls`, seconds, the count of a call's kernels, and the
            memory that cells may take, which tests replace.
    """

    store: Store
    machine: Machine
    limits: Measured
    deadline: float
    refcheck: bool = True
    timer: Callable[[Sequence[Call], bool], Timing] = time_calls
    clock: Callable[[], float] = time.monotonic
    kernels: Callable[[Call], int | None] | None = None
    free: Callable[[], float] = free_memory

    def over(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Result | None]]:
        """Run the jobs and yield each with its result; None where the time was up before it.

        What did not work in an earlier run comes last: it may take the GPU's context with it.

        Raises:
            DeviceLostError: one did; its result is kept.
        """
        held: _Held = _Held()
        free = self.free()
        longest: dict[tuple[str, str], float] = {}
        for job in sorted(jobs, key=lambda job: self.store.status(self._key(job)) in _TROUBLED):
            if self._done(job, free):
                continue
            begun, kind = self.clock(), (job.cell.suite, job.cell.operation)
            if begun + longest.get(kind, 0.0) > self.deadline:
                yield job, None
                continue
            result = self._result(job, held, free)
            self.store.add(result)  # before anything else is asked of the GPU
            longest[kind] = max(longest.get(kind, 0.0), self.clock() - begun)
            yield job, result
            self._settle(job, result, held)

    def _key(self, job: Job) -> str:
        return key_of(job.cell, job.subject.name, job.subject.version(), self.machine)

    def _done(self, job: Job, free: float) -> bool:
        """Whether an earlier run says all that this one could."""
        status = self.store.status(self._key(job))
        if status == TOO_BIG:
            return job.cell.memory > free
        return status == MEASURED or (status == UNCHECKED and not self.refcheck)

    def _settle(self, job: Job, result: Result, held: _Held) -> None:
        """Let go of a failed job's data, and see whether the GPU is still there."""
        try:
            if result.status in (FAILED, OUT_OF_MEMORY):
                held.clear()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLostError(
                f"{job.cell.suite} {job.cell.name} by {job.subject.name} took the GPU's context "
                f"with it ({result.reason or error}): that is kept, run again to go on"
            ) from error

    def _result(self, job: Job, held: _Held, free: float) -> Result:
        cell, subject = job.cell, job.subject
        empty = Result(
            cell.suite, cell.operation, cell.settings, subject.name, subject.version(), FAILED,
            asdict(self.machine), asdict(self.limits),
        )  # fmt: skip
        if cell.memory > free:
            reason = f"{cell.memory / GIB:.1f} GiB of {free / GIB:.1f} free"
            return replace(empty, status=TOO_BIG, reason=reason)
        try:
            return self._measured(empty, subject.trial(held.prepared(job), cell))
        except torch.OutOfMemoryError as error:
            return replace(empty, status=OUT_OF_MEMORY, reason=str(error).split(". ")[0])
        except Exception as error:  # a peer may fail in any way; the other cells go on
            return replace(empty, reason=_in_words(error))

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
        time = self.timer(trial.calls, trial.graph)
        timed = replace(
            empty,
            status=status,
            accuracy=accuracy,
            time_us=asdict(time),
            work=asdict(trial.work),
            launches=list(names) if ours else None,
        )
        return self._described(timed, trial, time)

    def _described(self, timed: Result, trial: Trial, time: Timing) -> Result:
        """The result with what is said beside its time, which an error there does not cost."""
        try:
            details = None if trial.details is None else trial.details(time, self.limits)
            timed = replace(timed, details=details)
            kernels = (self.kernels or profiled_kernels)(trial.calls[0])
            return replace(timed, device_kernels=kernels)
        except Exception as error:  # out of memory, a profiler that is not there
            return replace(timed, reason=_in_words(error))


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


class _Held:
    """The prepared data of one group by one implementation: there is memory for one at a time."""

    def __init__(self) -> None:
        self._of: tuple[str, ...] | None = None
        self._data: Any = None

    def prepared(self, job: Job) -> Any:
        if self._of != job.shares:
            self.clear()
            self._data, self._of = job.subject.prepare(job.cell), job.shares
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
