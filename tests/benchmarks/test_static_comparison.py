"""What machine code allows: bounds by hand, and one kernel of ours and of SGLang's compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from click.testing import CliRunner

from benchmarks import static_comparison
from benchmarks.static_comparison import STATIC, mix
from benchmarks.static_limits import bounds

ROOT = Path(__file__).parents[2]
ROW = {
    "arch": 90, "instructions": 2.0, "blocks_per_sm": 3, "programs": 13200, "buffers": 4,
    "trip_bytes": 8192.0,
}  # fmt: skip


def test_bounds_by_hand():
    """4.8 TB/s are 36.4 GB/s an SM: 20.8 bytes a clock of 1.75 GHz, 25.5 KB in 700 ns."""
    found = bounds(ROW)
    assert found.issue == pytest.approx(128 / 2.0 / 20.78, rel=1e-3)
    assert found.kib_in_flight == (3 * 3 * 8, 4 * 3 * 8)
    assert found.in_flight == pytest.approx((72 * 1024 / 25455, 96 * 1024 / 25455), rel=1e-3)
    assert found.verdict == "memory"
    assert bounds(ROW | {"programs": 66}).issue == found.issue / 2  # every other SM is idle


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"instructions": 6.4}, "issue slots"),  # 128 / 6.4 is 20 bytes a clock
        ({"buffers": 1}, "memory, if blocks overlap"),  # 24 KB between trips, 0 in them
        ({"buffers": 1, "trip_bytes": 2048.0}, "bytes in flight"),
        ({"programs": 33}, "bytes in flight"),  # a block on every fourth SM
        ({"arch": 100, "instructions": 5.0}, "issue slots"),  # 29.1 bytes a clock on a B200
    ],
)
def test_verdicts(change, verdict):
    assert bounds({**ROW, "trip_bytes": 9000.0} | change).verdict == verdict


def test_mix_tells_classes_apart():
    opcodes = {"HGMMA": 8, "LDGSTS": 4, "LDSM": 3, "STS": 1, "LOP3": 9, "IMAD": 2, "F2F": 5,
               "HFMA2": 6, "UIADD3": 7, "R2UR": 1, "BAR": 2, "UTCHMMA": 1, "F2FP": 1}  # fmt: skip
    assert mix(opcodes) == {
        "tensor": 9, "copies": 4, "loads and stores": 4, "conversions": 6, "integer": 11,
        "float": 6, "uniform": 8, "other": 2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def with_sglang(tmp_path_factory) -> tuple[dict[str, object], dict[str, object]]:
    """SGLang's settings, and rows of one case of both: the words choose it.

    In a process of its own: its settings are the whole process's, and the compiler is not there
    beside the interpreter.
    """
    output = tmp_path_factory.mktemp("static") / "rows.json"
    script = Path(__file__).with_name("with_sglang.py")
    words = ("decode, full", "fp8", "page 1,")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, output, *words],
        cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), json.loads(output.read_text())


def test_sglang_settings_are_published_as_its_kernels_read_them(with_sglang):
    settings, _ = with_sglang
    assert settings == {"sum_all_reduce": False, "deterministic": False, "ranks": 1}


def test_a_kernel_of_each_compiles_to_what_is_kept(with_sglang):
    _, content = with_sglang
    made = {row["by"]: row for row in content["rows"]}
    assert {by: row["kernel"] for by, row in made.items()} == {
        "step37": "decode_split_kernel", "SGLang": "_fwd_grouped_kernel_stage1",
    }  # fmt: skip
    # SGLang's loop takes 32 keys of one KV head, 2 x 128 bytes each, and copies none ahead.
    assert (made["SGLang"]["trip_bytes"], made["SGLang"]["buffers"]) == (8192, 1)
    assert made["step37"]["buffers"] > 1
    assert made["step37"]["instructions"] < made["SGLang"]["instructions"]
    kept = json.loads((STATIC / "comparison.json").read_text())
    if kept["triton"] == triton.__version__:
        found = {row["by"]: row for row in kept["rows"] if row in made.values()}
        assert found == made, "run `python -m benchmarks.static_comparison`, then benchmarks.render"


def test_linear_layers_are_compared_at_the_ranks_of_the_experts():
    """Of those that evidence/ compiles, the ones of TP1 and TP4."""
    names = {one.name for arch in (90, 100) for one in static_comparison.ours(arch)}
    kept = json.loads((STATIC / "comparison.json").read_text())["rows"]
    linears = {name for name in names if name.startswith("fp8 linear")}
    assert linears == {row["name"] for row in kept if row["name"].startswith("fp8 linear")}
    assert linears and all("TP=4" in name for name in linears if "TP=" in name)


def test_words_that_choose_nothing_are_refused(monkeypatch):
    monkeypatch.setattr(static_comparison, "ours", lambda arch: iter(()))
    monkeypatch.setattr(static_comparison, "sglangs", lambda arch: iter(()))
    done = CliRunner().invoke(static_comparison.main, ["--only", "nothing"])
    assert done.exit_code == 1 and "--only nothing: no kernel's name" in done.output
