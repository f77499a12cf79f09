"""The commands: what they print without a GPU, and how they refuse."""

from __future__ import annotations

import functools
import io
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from instant import Instant
from rich.console import Console

from benchmarks import attention, expert_accuracy, moe
from benchmarks.harness import command, plot, static
from benchmarks.harness.hardware import Machine
from benchmarks.harness.limits import Measured
from benchmarks.harness.results import Result, Store
from benchmarks.harness.run import Run
from step37_kernels.experts.formats import FORMATS

ROOT = Path(__file__).parents[2]
FIGURES = {
    "registers": 96, "shared_bytes": 8192, "blocks_per_sm": 4, "spills": 0,
    "tensor_core": ["HGMMA"], "bytes_in_flight": 40960, "per_unit": 3.1,
}  # fmt: skip
EVIDENCE = {
    "triton": "3.7.1",
    "findings": [
        {"case": "nvfp4 gate-up, 64 tokens", "kernel": "gate_up", "arch": 90, "figures": FIGURES},
        {"case": "decode, fp8", "kernel": "decode_split", "arch": 90, "figures": FIGURES},
    ],
}


@pytest.fixture(autouse=True)
def _no_gpu_and_nothing_compiled(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "static_figures", lambda cache: EVIDENCE)


def invoke(suite: click.Command, *arguments: str) -> str:
    done = CliRunner().invoke(suite, [*arguments, "--no-peers"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


def test_moe_without_a_gpu_says_what_it_would_measure():
    output = invoke(moe.main, "--only", "tokens=64", "--only", "format=nvfp4")
    row = next(
        line for line in output.splitlines()
        if "nvfp4" in line and "activations=bf16 parallel=TP4 routing=uniform tokens=64" in line
    )  # fmt: skip
    assert row.split("│")[2].strip() == "532.0" and "159.1" in row
    assert "nothing is measured" in output
    assert "gate_up" in output and "decode_split" not in output


def test_attention_without_a_gpu_says_what_it_would_measure():
    output = invoke(attention.main, "--only", "context=65536", "--only", "operation=decode")
    assert "decode kind=full parallel=TP1 cache=fp8 batch=1 context=65536" in output
    assert "decode_split" in output and "gate_up" not in output


def test_measuring_keeps_results_and_shows_them(tmp_path, monkeypatch, fixed_timing):
    """The path of a GPU with everything that needs one replaced."""
    machine = Machine("NVIDIA H200", 90, 132, 140 << 30, {}, {"torch": "2.11"}, "1234", "abc")
    measured = Measured(4e12, 4e12, {"bf16": 7e14})
    monkeypatch.setattr(command, "describe", lambda: machine)
    monkeypatch.setattr(command.limits, "measure", lambda: measured)
    replaced = functools.partial(Run, timer=fixed_timing, kernels=lambda call: 5)
    monkeypatch.setattr(command, "Run", replaced)
    cells = [cell for cell in moe.SUITE.cells() if cell.priority == 0][:3]
    store = Store(tmp_path / "results.json")

    def measure(seconds: float) -> str:
        text = io.StringIO()
        console = Console(file=text, width=220)
        parts = [command.Part(moe.SUITE, cells, [Instant()])]
        command._measure(console, parts, store, seconds, True)
        return text.getvalue()

    output = measure(-1.0)
    assert "3 of 3 left when the budget ended" in output and not list(store)
    output = measure(60.0)
    assert "NVIDIA H200 (data sheet H200): read 4000 GB/s" in output
    assert "budget ended" not in output
    assert [one.implementation for one in store] == ["instant"] * 3
    assert output.count("100.0") == 3 and output.count("95.0-110.0") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "soon"], "--budget is 'soon'"),
        (["--only", "tokens"], "--only is 'tokens'"),
        (["--only", "tokens=3"], "tokens can be 1, 128"),
        (["--results", __file__], "is not a results file"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    done = CliRunner().invoke(moe.main, arguments)
    assert done.exit_code == 1 and message in done.output


def test_static_figures_are_compiled_once(tmp_path, monkeypatch):
    made = []

    def child(command, **options):
        made.append(command)
        assert "TRITON_INTERPRET" not in options["env"]
        Path(command[command.index("--json") + 1]).write_text(json.dumps(EVIDENCE))
        return subprocess.CompletedProcess(command, 1, "", "a limit is broken")

    monkeypatch.setattr(static.subprocess, "run", child)
    assert static.static_figures(tmp_path) == static.static_figures(tmp_path) == EVIDENCE
    assert len(made) == 1


def test_no_static_figures_is_an_error_with_the_reason(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "no module named triton")
    monkeypatch.setattr(static.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(RuntimeError, match="no module named triton"):
        static.static_figures(tmp_path)
    assert not list(tmp_path.iterdir())


def result(tokens: int, by: str, median: float | None) -> Result:
    time = {"median": median, "least": 1.0, "p10": 1.0, "p90": 9.0, "samples": 9, "calls": 1}
    return Result(
        "moe", "experts", {"format": "fp8", "tokens": tokens}, by, "1", "measured",
        {"device": "NVIDIA H200"}, {"read": 4e12, "copy": 4e12, "flops": {}},
        time_us=None if median is None else time | {"graph": True},
        work={"stream_bytes": 4e6, "bytes": 4e6, "flops": 1e9, "matmul": "fp8"},
    )  # fmt: skip


RESULTS = [
    result(8, "step37", 4.0), result(1, "step37", 2.0), result(1, "peer", 3.0),
    result(64, "peer", None),
]  # fmt: skip


def test_a_plot_has_a_panel_per_setting_and_a_line_per_implementation(tmp_path):
    (panel,) = plot.panels(RESULTS, "tokens").items()
    assert panel[0] == "experts format=fp8"
    lines = {by: [one.settings["tokens"] for one in line] for by, line in panel[1].items()}
    assert lines == {"step37": [1, 8], "peer": [1]}
    pytest.importorskip("matplotlib")
    plot.plot(RESULTS, "tokens", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("capability", "fp4"), [(None, True), ((9, 0), False), ((10, 0), True), ((12, 0), True)]
)
def test_fp4_products_are_left_to_gpus_that_have_them(monkeypatch, capability, fp4):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    pairs = set(FORMATS)
    assert set(expert_accuracy.pairs()) == (pairs if fp4 else pairs - {("nvfp4", "nvfp4")})


def test_runs_from_a_bare_checkout(tmp_path):
    """Only the path of the checkout: nothing of this project is installed."""
    blocked = "import sys; sys.path[:] = [p for p in sys.path if not p.endswith('kernels')]"
    code = f"{blocked}; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]"
    code += "; sys.modules['sglang'] = None; import benchmarks.__main__, benchmarks.render"
    code += "; import step37_kernels; print(step37_kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().startswith(str(ROOT / "kernels"))
