"""`python -m benchmarks`: its suites, and several suites in one run."""

from __future__ import annotations

import functools
import io
import json
from types import SimpleNamespace

import click
import pytest
import torch
from click.testing import CliRunner
from instant import Instant
from rich.console import Console
from rich.table import Table

from benchmarks import __main__ as entry
from benchmarks import attention, moe, step_tiny
from benchmarks.harness import command
from benchmarks.harness.cells import Cell
from benchmarks.harness.hardware import Machine
from benchmarks.harness.limits import Measured
from benchmarks.harness.results import Store
from benchmarks.harness.run import DeviceLostError, Run
from benchmarks.step_cells import depth_within

NO_FIGURES = {"triton": "3.7.1", "findings": []}


@pytest.fixture(autouse=True)
def _no_gpu_and_nothing_compiled(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "static_figures", lambda cache: NO_FIGURES)
    monkeypatch.setattr(step_tiny, "table", lambda: Table("a tiny model"))


def invoke(*arguments: str) -> str:
    done = CliRunner().invoke(entry.main, [*arguments, "--no-peers"])
    assert done.exit_code == 0, done.output
    return done.output


def test_without_a_gpu_a_suite_prints_its_floors():
    output = invoke("--suite", "smoke")
    assert "nothing is measured" in output and "a tiny model" in output
    for operation in ("experts", "route", "layer", "decode kind=full", "prologue", "layers=4"):
        assert output.count(f"│ {operation}") + output.count(f" {operation} ") >= 1, operation
    kernels = invoke("--suite", "kernels", "--only", "tokens=64")
    assert "experts format=nvfp4" in kernels and "a tiny model" not in kernels


def test_suites_are_made_of_the_benchmarks():
    names = {name: [one.name for one in make(None)] for name, make in entry.SUITES.items()}
    assert names == {
        "smoke": ["step", "moe", "attention"],
        "kernels": ["moe", "attention"],
        "step": ["step"],
        "all": ["step", "moe", "attention"],
    }
    for suite in entry.SUITES["smoke"](None):
        operations = [cell.operation for cell in suite.cells()]
        assert len(operations) == len(set(operations)) >= 2
    whole = {cell.operation for cell in moe.SUITE.cells()}
    assert {cell.operation for cell in entry.smoke(moe.SUITE).cells()} == whole


def test_only_chooses_among_all_suites():
    output = invoke("--suite", "all", "--only", "kind=sliding", "--only", "context=1024")
    assert "decode kind=sliding" in output and "experts format" not in output
    done = CliRunner().invoke(entry.main, ["--only", "colour=red"])
    assert done.exit_code == 1 and "colour can be nothing" in done.output


def test_several_suites_share_a_file_and_a_budget(tmp_path, monkeypatch, fixed_timing):
    machine = Machine("NVIDIA H200", 90, 132, 140 << 30, {}, {"torch": "2.11"}, "1234", "abc")
    monkeypatch.setattr(command, "describe", lambda: machine)
    monkeypatch.setattr(command.limits, "measure", lambda: Measured(4e12, 4e12, {"bf16": 7e14}))
    replaced = functools.partial(Run, timer=fixed_timing, kernels=lambda call: 5)
    monkeypatch.setattr(command, "Run", replaced)
    subject = Instant()

    def of(suite: command.Suite, priorities: set[int]) -> command.Part:
        chosen: dict[int, Cell] = {}
        for cell in suite.cells():
            if cell.priority in priorities:
                chosen.setdefault(cell.priority, cell)
        return command.Part(suite, list(chosen.values()), [subject])

    parts = [of(moe.SUITE, {0, 1, 2}), of(attention.SUITE, {0, 1})]
    text, path = io.StringIO(), tmp_path / "all.json"
    command._measure(Console(file=text, width=220), parts, Store(path), 60.0, True)
    assert subject.ran == [("moe", 0), ("attention", 0), ("attention", 1), ("moe", 1), ("moe", 2)]
    suites = [one["suite"] for one in json.loads(path.read_text())["results"]]
    assert sorted(suites) == ["attention"] * 2 + ["moe"] * 3
    moes, attentions = text.getvalue().split("attention on NVIDIA H200")
    assert "moe on NVIDIA H200" in moes and moes.count("100.0") == 3
    assert attentions.count("100.0") == 2


def test_a_lost_device_is_one_sentence_after_the_tables(tmp_path, monkeypatch):
    class Lost(Run):
        def over(self, jobs):
            yield jobs[0], None
            raise DeviceLostError("moe a=1 took the GPU's context with it")

    monkeypatch.setattr(command, "describe", lambda: Machine("H", 90, 1, 1, {}, {}, None, "abc"))
    monkeypatch.setattr(command.limits, "measure", lambda: Measured(4e12, 4e12, {}))
    monkeypatch.setattr(command, "Run", Lost)
    part = command.Part(moe.SUITE, moe.SUITE.cells()[:1], [Instant()])
    text = io.StringIO()
    with pytest.raises(click.ClickException, match="took the GPU's context"):
        command._measure(Console(file=text, width=99), [part], Store(tmp_path / "r"), 60.0, True)
    assert "moe on H" in text.getvalue()


def test_the_depth_is_what_fits_or_what_is_asked(monkeypatch):
    """80.2 GB of 24 layers at batch 64 are more than 95% of 78 GiB and less than of 81559 MiB."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def layers(total: int, asked: int | None = None) -> dict[object, object]:
        device = SimpleNamespace(total_memory=total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda of: device)
        (suite,) = entry.SUITES["step"](asked)
        decode = [one.settings for one in suite.cells() if one.settings["format"] == "nvfp4"]
        return {one["parallel"]: one["layers"] for one in decode}

    assert layers(78 << 30) == {"TP1": 23, "TP4-rank": 45}
    assert depth_within(81559 << 20, "nvfp4", "bf16", 1) == 24
    assert layers(78 << 30, 10) == {"TP1": 10, "TP4-rank": 10}
    done = CliRunner().invoke(entry.main, ["--suite", "kernels", "--layers", "3"])
    assert done.exit_code == 2 and "--layers is of a step" in done.output


def test_results_go_where_json_says(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(entry, "run_together", lambda *args, **options: asked.update(path=args[1]))
    invoke("--suite", "step", "--json", str(tmp_path / "h200.json"))
    assert asked["path"] == tmp_path / "h200.json"
    invoke("--suite", "step")
    assert asked["path"] == command.OUT / "results.json"
