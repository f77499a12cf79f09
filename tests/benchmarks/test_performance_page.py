"""docs/performance.md is what the kept results render to, and claims nothing unmeasured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import attention_cells, expert_cells, predictions, render
from benchmarks.harness.cells import Cell
from benchmarks.harness.results import Result, Store
from benchmarks.measurements import NOT_MEASURED, Measurements
from benchmarks.render import PAGE, all_cells, floor_us, page, step_cell
from step37_ext.deploy.data_sheets import DATA_SHEETS


def test_the_committed_page_is_the_rendered_one():
    assert PAGE.read_text() == page(Measurements()), "run `python -m benchmarks.render`"


def kept(
    folder,
    cell: Cell,
    us: float | None,
    status: str = "measured",
    by: str = "step37",
    **more: object,
) -> None:
    time = {
        "median": us,
        "least": us,
        "p10": us,
        "p90": us,
        "samples": 9,
        "calls": 1,
        "graph": True,
    }
    machine = {
        "device": "NVIDIA H200", "source": "abc", "versions": {"torch": "2.11", "triton": "3.6"},
        "clocks": {"driver_version": "580.1"}, "commit": "1234567",
    }  # fmt: skip
    result = Result(
        cell.suite, cell.operation, cell.settings, by, "1", status, machine,
        {"read": 4.2e12, "copy": 4e12, "flops": {}}, time_us=time if us else None, **more,
    )  # fmt: skip
    Store(folder / "h200-2026-12-01.json").add(result)


def rows(text: str, beginning: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(f"| {beginning}")
    ]


def test_nothing_is_measured_where_nothing_is_kept(tmp_path):
    text = page(Measurements(tmp_path))
    assert "No GPU has run any of this yet" in text
    for beginning in ("decode, nvfp4", "experts, ", "decode, full, TP1", "NVFP4 experts"):
        found = rows(text, beginning)
        assert found, beginning
        for row in found:
            # After operation and MB, each GPU's floor and what was measured; of aims the last 3.
            cells = row[3:] if beginning == "NVFP4 experts" else row[3::2]
            assert set(cells) == {NOT_MEASURED}, row


def test_a_measurement_stands_in_its_cell_alone(tmp_path):
    cell = next(one for one in expert_cells.cells() if one.priority == 0)
    other = next(one for one in attention_cells.cells() if one.priority == 0)
    kept(tmp_path, cell, 18.25)
    kept(tmp_path, other, None, status="failed")
    text = page(Measurements(tmp_path))
    assert "- NVIDIA H200, driver 580.1, torch 2.11, Triton 3.6, commit 1234567; " in text
    assert "4200 GB/s" in text and "No GPU has run" not in text
    (row,) = (row for row in rows(text, render.label(cell)) if row[0] == render.label(cell))
    assert [row[3], row[5], row[7]] == [NOT_MEASURED, "18.2", NOT_MEASURED]
    (row,) = (row for row in rows(text, render.label(other)) if row[0] == render.label(other))
    assert row[5] == "failed"


@pytest.mark.parametrize(
    ("share", "verdict"), [(1.25, "below"), (1 / 0.6, "inside"), (2.5, "above")]
)
def test_predictions_stand_beside_measurements(tmp_path, share, verdict):
    cell = next(one for one in expert_cells.cells() if one.priority == 0)
    floor = floor_us(cell, DATA_SHEETS["H200"])
    kept(tmp_path, cell, share * floor)
    (row,) = rows(page(Measurements(tmp_path)), f"{cell.name} | H200")
    assert row[2:] == [
        f"{floor:.1f}", f"{floor / 0.7:.1f} to {floor / 0.5:.1f}", f"{share * floor:.1f}", verdict,
    ]  # fmt: skip


def test_a_measured_step_shows_its_aims_and_its_breakdown(tmp_path):
    details = {
        "tokens_per_s": 222.0, "of_floor": 0.72, "floor_us": 3244.0,
        "breakdown": [
            {"name": "nvfp4_gate_up_kernel", "launches": 42, "us": 900.0},
            {"name": "outside kernels", "launches": 0, "us": 90.0},
        ],
    }  # fmt: skip
    kept(tmp_path, step_cell("bf16", 1), 4500.0, details=details)
    text = page(Measurements(tmp_path))
    (row,) = rows(text, "NVFP4 experts, BF16 others, batch 1")
    assert row[3:] == ["222", "72%", "9.1%"]  # of the profiled step, 990 us
    assert rows(text, "nvfp4_gate_up_kernel") == [["nvfp4_gate_up_kernel", "42", "900.0", "90.9%"]]


def test_a_step_without_a_profile_says_why(tmp_path):
    details = {"tokens_per_s": 222.0, "of_floor": 0.72, "no_breakdown": "no profiler"}
    kept(tmp_path, step_cell("bf16", 1), 4500.0, details=details)
    kept(tmp_path, step_cell("bf16", 64), 29000.0, reason="OutOfMemoryError: full")
    text = page(Measurements(tmp_path))
    (row,) = rows(text, "NVFP4 experts, BF16 others, batch 1 |")
    assert row[3:] == ["222", "72%", NOT_MEASURED]
    assert "H200, bf16 others, batch 1: not divided, no profiler" in text
    assert "H200, bf16 others, batch 64: not divided, OutOfMemoryError: full" in text


def test_a_predicted_step_starts_its_kernels(tmp_path):
    cell = step_cell("bf16", 1)
    floor = floor_us(cell, DATA_SHEETS["H200"])
    # Below floor / 0.7 + 708 launches of 1 us, above floor / 0.7.
    kept(tmp_path, cell, floor / 0.7 + 700, details={"tokens_per_s": 1.0, "of_floor": 0.5})
    (row,) = rows(page(Measurements(tmp_path)), f"{cell.name} | H200")
    assert row[3:] == [
        f"{floor / 0.7 + 708:.1f} to {floor / 0.5 + 1416:.1f}", f"{floor / 0.7 + 700:.1f}", "below",
    ]  # fmt: skip


def test_a_step_of_fewer_layers_is_shown_as_what_it_is(tmp_path):
    cell = step_cell("bf16", 1)
    scaled = {"us": 4600.0, "tokens_per_s": 217.0, "of_floor": 0.7, "how": "scaled from 24 of 45"}
    of_few = replace(cell, settings=cell.settings | {"layers": 24})
    kept(tmp_path, of_few, 2450.0, details={"scaled": scaled})
    text = page(Measurements(tmp_path))
    (row,) = rows(text, "decode, nvfp4, dense bf16, TP1, layers 24, batch 1, context 8192")
    assert row[1:] == ["H200", "2450.0", "4600.0", "217", "70%", "scaled from 24 of 45"]
    (row,) = rows(text, "decode, nvfp4, dense bf16, TP1, batch 1, context 8192 ")
    assert row[5] == NOT_MEASURED


def test_peers_stand_beside_ours(tmp_path):
    cells = [one for one in expert_cells.cells() if one.priority == 0]
    kept(tmp_path, cells[0], 20.0)
    kept(tmp_path, cells[0], 30.0, by="SGLang Marlin")
    kept(tmp_path, cells[1], 40.0, by="SGLang Marlin")
    found = rows(page(Measurements(tmp_path)), f"{render.label(cells[0])} | H200")
    assert found[0][2:] == ["SGLang Marlin 1", "30.0", "20.0", "1.50"]
    found = rows(page(Measurements(tmp_path)), f"{render.label(cells[1])} | H200")
    assert found[0][2:] == ["SGLang Marlin 1", "40.0", NOT_MEASURED, NOT_MEASURED]


def test_a_plot_needs_a_measurement_and_matplotlib(tmp_path):
    pytest.importorskip("matplotlib")
    cell = next(one for one in expert_cells.cells() if one.priority == 0)
    kept(tmp_path, cell, 20.0)
    points = list(predictions.predicted(Measurements(tmp_path), floor_us, all_cells()))
    predictions.plot(points, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_a_file_that_is_not_one_of_results_is_named(tmp_path):
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(ValueError, match="notes.json is not a results file"):
        Measurements(tmp_path)
