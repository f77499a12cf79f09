"""Running cells: order, budget, resuming, and no speed of a result that is wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.harness import hardware, results
from benchmarks.harness.cells import Accuracy, Cell, Trial, Work, selected
from benchmarks.harness.hardware import Machine
from benchmarks.harness.limits import Measured
from benchmarks.harness.report import rates, result_table
from benchmarks.harness.results import (
    FAILED,
    MEASURED,
    OUT_OF_MEMORY,
    TOO_BIG,
    UNCHECKED,
    WRONG,
    Store,
)
from benchmarks.harness.run import DeviceLostError, Run, merged, ordered, parse_budget
from step37_ext.deploy.data_sheets import data_sheet

WORK = Work(stream_bytes=2e8, bytes=3e8, flops=5e10, matmul="bf16")
MACHINE = Machine("NVIDIA H100 80GB HBM3", 90, 132, 80 << 30, {}, {"torch": "2.11"}, None, "abc")
LIMITS = Measured(read=3e12, copy=2.9e12, flops={"bf16": 7e14, "fp8": 1.4e15})


def cell(tokens: int, priority: int = 0, group: str = "a", memory: float = 1e9) -> Cell:
    return Cell("moe", "experts", {"tokens": tokens}, priority, group, WORK, memory)


class Fake:
    """An implementation that notes what is asked of it."""

    def __init__(self, name: str = "step37", error: float = 0.001, refused: int = -1) -> None:
        self.name, self.error, self.refused = name, error, refused
        self.log: list[str] = []

    def version(self) -> str:
        return "1"

    def available(self) -> tuple[bool, str]:
        return True, "1"

    def refuses(self, cell: Cell) -> str | None:
        return "no" if cell.settings["tokens"] == self.refused else None

    def prepare(self, cell: Cell) -> str:
        self.log.append(f"prepare {cell.group}")
        return cell.group

    def trial(self, prepared: str, cell: Cell) -> Trial:
        assert prepared == cell.group
        self.log.append(f"trial {cell.settings['tokens']}")
        check = lambda: Accuracy(self.error, 0.01)  # noqa: E731
        return Trial([lambda: None] * 3, check, WORK)


@pytest.fixture
def run(tmp_path, fixed_timing):
    """A run with a clock that stands still, into tmp_path/results.json."""

    def make(**changes) -> Run:
        store = Store(tmp_path / "results.json")
        made = Run(store, MACHINE, LIMITS, 60.0, timer=fixed_timing, clock=lambda: 0.0)
        return replace(made, **{"kernels": lambda call: 4, "free": lambda: 80 << 30} | changes)

    return make


def statuses(run: Run, cells: list[Cell], *subjects: Fake) -> dict[str, str | None]:
    done = run.over(ordered(cells, subjects))
    return {
        f"{job.subject.name} {job.cell.settings['tokens']}": result and result.status
        for job, result in done
    }


def test_most_telling_cells_first_and_groups_together():
    cells = [cell(1, 1, "b"), cell(2, 0, "b"), cell(3, 0, "a"), cell(4, 0, "b")]
    ours, peer = Fake(), Fake("peer", refused=4)
    order = [(j.cell.settings["tokens"], j.subject.name) for j in ordered(cells, [ours, peer])]
    assert order == [
        (3, "step37"), (3, "peer"), (2, "step37"), (4, "step37"), (2, "peer"),
        (1, "step37"), (1, "peer"),
    ]  # fmt: skip


def test_data_is_prepared_once_for_a_group(run):
    subject = Fake()
    statuses(run(), [cell(1), cell(2), cell(3, group="b")], subject)
    assert subject.log == ["prepare a", "trial 1", "trial 2", "prepare b", "trial 3"]


def test_a_wrong_result_has_no_time(run, tmp_path):
    def refuse(calls, graph):
        raise AssertionError("a wrong result was timed")

    for error in (0.02, float("nan")):
        assert statuses(run(timer=refuse), [cell(1)], Fake(error=error)) == {"step37 1": WRONG}
        (result,) = Store(tmp_path / "results.json")
        assert result.time_us is None and rates(result) == {}
        assert "0.01" in result.reason


def test_without_a_check_a_time_is_marked(run, tmp_path):
    found = statuses(run(refcheck=False), [cell(1)], Fake(error=9.0))
    assert found == {"step37 1": UNCHECKED}
    (result,) = Store(tmp_path / "results.json")
    assert result.accuracy is None
    table = result_table([result], "")
    assert UNCHECKED in list(table.columns[-1].cells)


def test_an_unchecked_time_is_measured_again_by_a_run_that_checks(run):
    assert statuses(run(refcheck=False), [cell(1)], Fake()) == {"step37 1": UNCHECKED}
    assert statuses(run(refcheck=False), [cell(1)], Fake()) == {}
    assert statuses(run(), [cell(1)], Fake()) == {"step37 1": MEASURED}
    assert statuses(run(refcheck=False), [cell(1)], Fake()) == {}


def test_a_later_run_goes_on_where_the_first_stopped(run):
    cells = [cell(1), cell(2)]
    assert statuses(run(), cells[:1], Fake()) == {"step37 1": MEASURED}
    again = Fake()
    assert statuses(run(), cells, again) == {"step37 2": MEASURED}
    assert again.log == ["prepare a", "trial 2"]
    # Other sources or another GPU are other measurements.
    for change in ({"source": "def"}, {"device": "NVIDIA H200"}):
        other = run(machine=replace(MACHINE, **change))
        assert statuses(other, cells[:1], Fake()) == {"step37 1": MEASURED}


def test_the_budget_ends_a_run_before_a_cell_that_would_pass_it(run):
    now = iter(range(0, 1000, 20))  # every look at the clock is 20 s later: a cell takes 20 s
    limited = run(clock=lambda: float(next(now)), deadline=90.0)
    found = statuses(limited, [cell(1), cell(2), cell(3)], Fake())
    # Begun at 0 and at 40; begun at 80, the third would end at 100.
    assert found == {"step37 1": MEASURED, "step37 2": MEASURED, "step37 3": None}


def test_a_long_cell_of_one_operation_does_not_forbid_anothers(run):
    now = iter([0, 50, 55, 60, 60, 61])  # the step takes 50 s; 5 s and 1 s are two of the others
    limited = run(clock=lambda: float(next(now)), deadline=90.0)
    step = replace(cell(1), suite="step", operation="decode")
    assert statuses(limited, [step, cell(2), cell(3)], Fake()) == dict.fromkeys(
        ("step37 1", "step37 2", "step37 3"), MEASURED
    )


def test_what_does_not_fit_says_so(run, tmp_path):
    class Greedy(Fake):
        def trial(self, prepared, cell):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. More words")

    assert statuses(run(), [cell(1, memory=79e9)], Fake()) == {"step37 1": MEASURED}
    assert statuses(run(), [cell(2, memory=99e9)], Fake()) == {"step37 2": TOO_BIG}
    assert statuses(run(), [cell(3)], Greedy()) == {"step37 3": OUT_OF_MEMORY}
    reasons = [one.reason for one in Store(tmp_path / "results.json")]
    assert reasons == ["", "92.2 GiB of 80.0 free", "CUDA out of memory"]
    # What the estimate forbids is not asked again unless there is more room; what it allowed is.
    assert statuses(run(), [cell(2, memory=99e9), cell(3)], Fake()) == {"step37 3": MEASURED}
    roomy = run(free=lambda: 100e9)
    assert statuses(roomy, [cell(2, memory=99e9)], Fake()) == {"step37 2": MEASURED}


def test_a_failing_peer_stops_nothing_and_is_tried_again(run):
    class Broken(Fake):
        def prepare(self, cell):
            raise TypeError("takes another argument now")

    peer = Broken("peer")
    both = {"step37 1": MEASURED, "peer 1": FAILED}
    assert statuses(run(), [cell(1)], Fake(), peer) == both
    assert statuses(run(), [cell(1)], Fake(), peer) == {"peer 1": FAILED}


def test_a_device_fault_is_kept_and_ends_the_run_and_comes_last_in_the_next(run, monkeypatch):
    class Faulty(Fake):
        def trial(self, prepared, cell):
            if cell.settings["tokens"] == 2:
                raise RuntimeError("an illegal memory access was encountered")
            return super().trial(prepared, cell)

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    cells = [cell(2), cell(1), cell(3)]
    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "is_available", lambda: True)
        faulty = Faulty()
        for name in ("empty_cache", "synchronize"):  # after the fault every call raises
            gpu.setattr(torch.cuda, name, lambda: lost() if faulty.log else None)
        with pytest.raises(DeviceLostError, match="moe experts tokens=2 by step37 took the GPU's"):
            statuses(run(), cells, faulty)
    again = statuses(run(), cells, Faulty())
    assert list(again.items()) == [
        ("step37 1", MEASURED), ("step37 3", MEASURED), ("step37 2", FAILED),
    ]  # fmt: skip


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), TypeError("no profiler")])
def test_what_is_said_beside_a_time_does_not_cost_it(run, tmp_path, error):
    def failing(*of):
        raise error

    class Telling(Fake):
        def trial(self, prepared, cell):
            return replace(super().trial(prepared, cell), details=lambda *of: {"said": 1})

    assert statuses(run(kernels=failing), [cell(1)], Telling()) == {"step37 1": MEASURED}
    (result,) = Store(tmp_path / "results.json")
    assert (result.details, result.device_kernels) == ({"said": 1}, None)
    assert result.time_us["median"] == 100.0 and str(error) in result.reason
    assert result.reason in list(result_table([result], "").columns[-1].cells)


def test_the_largest_data_is_held_from_one_priority_to_the_next():
    def job(group: str, priority: int, memory: float):
        return ordered([cell(1, priority, group, memory)], [Fake()])[0]

    sizes = {"model": 9e9, "a": 1e9, "b": 2e9}
    jobs = [job(group, p, size) for group, size in sizes.items() for p in range(3)]
    order = [(one.cell.priority, one.cell.group) for one in merged(jobs)]
    assert order == [
        (0, "model"), (0, "a"), (0, "b"), (1, "b"), (1, "a"), (1, "model"),
        (2, "model"), (2, "a"), (2, "b"),
    ]  # fmt: skip


def test_a_source_that_decides_no_time_changes_no_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "ROOT", tmp_path)
    hashes = []
    for name in ("step_cells.py", "render.py", "harness/run.py", "harness/report.py"):
        path = tmp_path / "benchmarks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        hashes.append(hardware.source_hash())
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]


def test_results_survive_the_way_through_the_file(run, tmp_path):
    jobs = ordered([cell(1), cell(2)], [Fake(), Fake("peer", error=0.5)])
    made = [result for _, result in run().over(jobs)]
    assert [one.status for one in made if one] == [MEASURED, MEASURED, WRONG, WRONG]
    assert list(Store(tmp_path / "results.json")) == made


def test_a_stop_while_writing_leaves_the_old_file(run, tmp_path, monkeypatch):
    statuses(run(), [cell(1)], Fake())
    whole = (tmp_path / "results.json").read_text()

    def stopped(content, file, **options):
        file.write(json.dumps(content)[:50])
        raise KeyboardInterrupt

    monkeypatch.setattr(results.json, "dump", stopped)
    with pytest.raises(KeyboardInterrupt):
        statuses(run(), [cell(2)], Fake())
    assert (tmp_path / "results.json").read_text() == whole


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 0, "results": []}', '{"schema": 1}'])
def test_a_file_that_is_no_results_file_is_refused(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="results.json is not a results file"):
        Store(path)


def test_rates_are_against_the_limits_of_the_same_run(run, tmp_path):
    statuses(run(), [cell(1)], Fake())
    (result,) = Store(tmp_path / "results.json")
    # 100 us: 2e8 bytes are 2 TB/s, of 3 measured and 3.35 on the data sheet; 5e10 operations are
    # 500 TFLOP/s of 700 measured; 3e8 bytes at 3 TB/s are a floor of 100 us.
    assert rates(result) == pytest.approx({
        "bytes_per_s": 2e12, "flops_per_s": 5e14, "of_read": 2 / 3, "of_sheet": 2 / 3.35,
        "of_matmul": 5 / 7, "times_floor": 1.0,
    })  # fmt: skip
    of_step = replace(result, details={"floor_us": 80.0})  # the sum of its operations' floors
    assert rates(of_step)["times_floor"] == pytest.approx(100 / 80)


def test_budget_in_words():
    assert [parse_budget(text) for text in ("90s", "8m", "1.5h")] == [90, 480, 5400]
    for text in ("8", "m", "8 m", "-1m"):
        with pytest.raises(ValueError, match="--budget"):
            parse_budget(text)


def test_choosing_cells_names_what_there_is():
    cells = [cell(1), cell(8)]
    assert selected(cells, {"tokens": ["8"], "operation": ["experts"]}) == cells[1:]
    with pytest.raises(ValueError, match="tokens can be 1, 8"):
        selected(cells, {"tokens": ["2"]})
    with pytest.raises(ValueError, match="colour can be nothing"):
        selected(cells, {"colour": ["red"]})


def test_data_sheets_by_device_name():
    names = {
        "NVIDIA H100 80GB HBM3": "H100 SXM",
        "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA H200": "H200",
        "NVIDIA B200": "B200",
        "NVIDIA GB200": "GB200",
        "NVIDIA B300 SXM6 AC": "B300",
        "NVIDIA GB300": "GB300",
    }
    found = {name: data_sheet(name) for name in names}
    assert {name: sheet and sheet.name for name, sheet in found.items()} == names
    assert data_sheet("NVIDIA GeForce RTX 4090") is data_sheet("NVIDIA GH200 480GB") is None
