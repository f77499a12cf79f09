"""`step37 command` and `step37 serve` as a shell sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from step37_ext.cli import main
from step37_ext.compat import NEWEST_CHECKED
from step37_ext.deploy.report import plan_command, print_rows

H200 = "--gpu h200 --count 1 --quant nvfp4"
TOO_LITTLE = "--gpu h200 --count 2 --quant bf16"


def step37(arguments: str) -> Result:
    return CliRunner().invoke(main, arguments.split())


def test_command_prints_plan_and_command():
    result = step37(f"command {H200} --context 65536 --tools")
    assert result.exit_code == 0
    assert "NVFP4 on 1 x H200: fits" in result.output
    for row in ("routed experts", "attention", "vision encoder", "embedding", "left", "reserve"):
        assert row in result.output
    assert "--model-path stepfun-ai/Step-3.7-Flash-NVFP4" in result.output
    assert "24 KiB a token in the 12 full layers" in result.output
    assert "docker" not in result.output and "\x1b" not in result.output


def test_command_without_room_says_what_fits():
    result = step37(f"command {TOO_LITTLE} --reasoning")
    assert result.exit_code == 1
    assert "BF16 on 2 x H200: does not fit" in result.output and "lacks" in result.output
    assert "step37 command --gpu h200 --count 4 --quant bf16 --reasoning" in result.output
    assert "sglang serve" not in result.output


def test_dense_weights_are_a_variable_before_the_command():
    plain = step37(f"command {H200}").output
    shown = step37(f"command {H200} --dense-weights fp8 --docker").output
    assert "STEP37_DENSE_WEIGHTS" not in plain and "made FP8 one by one" not in plain
    assert "\nSTEP37_DENSE_WEIGHTS=fp8 \\\n    sglang serve" in shown
    assert "-e STEP37_DENSE_WEIGHTS=fp8 lmsysorg" in shown and "made FP8 one by one" in shown
    set_already = CliRunner(env={"STEP37_DENSE_WEIGHTS": "fp8"})
    again = set_already.invoke(main, f"command {H200} --docker".split()).output
    assert again == shown


@pytest.mark.parametrize("arguments", [H200, f"{TOO_LITTLE} --dense-weights bf16"])
def test_dense_weights_win_over_the_variable_in_all_that_is_said(arguments, monkeypatch):
    monkeypatch.setenv("STEP37_DENSE_WEIGHTS", "fp8")
    plan = json.loads(step37(f"command {arguments} --dense-weights bf16 --json").output)
    assert plan["request"]["dense_weights"] == "bf16"
    assert plan["environment"] == {"STEP37_DENSE_WEIGHTS": "bf16"}
    assert all(command[-2:] == ["--dense-weights", "bf16"] for command in plan["nearest"])
    assert plan["fits"] or plan["nearest"]


def test_docker_and_its_note():
    output = step37(f"command {H200} --docker").output
    assert f"lmsysorg/sglang:v{NEWEST_CHECKED}" in output and "was not checked" in output


def test_json():
    result = step37(f"command {H200} --docker --json")
    plan = json.loads(result.output)
    assert result.exit_code == 0 and plan["fits"]
    memory = plan["memory_per_gpu"]
    parts = ("outside_sglang", "activations_and_graphs", "image_cache", "kv_cache_available")
    assert sum(memory[p] for p in parts) + sum(memory["weights"].values()) == memory["total"]
    assert plan["commands"][0][:2] == ["sglang", "serve"] and plan["docker"][0][0] == "docker"
    lacking = step37(f"command {TOO_LITTLE} --json")
    plan = json.loads(lacking.output)
    assert lacking.exit_code == 1 and not plan["fits"]
    assert plan["commands"] == [] and plan["nearest"][0][:2] == ["step37", "command"]


@pytest.mark.parametrize(
    "arguments", [H200, TOO_LITTLE, "--gpu h100 --count 8 --quant fp8 --mtp --dense-weights fp8"]
)
def test_named_plans_are_what_a_user_can_type(arguments):
    plan = json.loads(step37(f"command {arguments} --json").output)
    for command in plan["nearest"]:
        assert CliRunner().invoke(main, command[1:]).exit_code == 0
    from step37_ext.deploy.plans import Request

    again = plan_command(Request(**plan["request"]))
    assert again == ["step37", "command", *arguments.split()]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("command --gpu h200 --count 3 --quant fp8", "--count 3 with --nodes 1: --tp 3 does not"),
        ("command --gpu a100 --count 4 --quant fp8", "'a100' is not one of 'h100', 'h200'"),
        ("command --gpu h200 --count four --quant fp8", "'--count': 'four' is not a valid integer"),
        ("serve --gpu gb200 --count 4 --nodes 2 --quant fp8", "--nodes 2: serve starts one node"),
        (f"serve {TOO_LITTLE}", "--gpu h200 --count 4 --quant bf16"),
    ],
)
def test_mistakes_are_one_sentence(arguments, said):
    result = step37(arguments)
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit)
    assert said in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("command", ["command", "serve"])
def test_help_has_examples(command):
    output = step37(f"{command} --help").output
    assert f"step37 {command} --gpu h200 --count 4 --quant fp8" in output


def test_version():
    from importlib.metadata import version

    assert version("step37-ext") in step37("--version").output


@pytest.fixture
def run(tmp_path: Path):
    """Run step37 in a process of its own with a `sglang` that writes its arguments and ends."""
    fake = tmp_path / "sglang"
    fake.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" > "$0.arguments"\n'
        'echo "dense weights: $STEP37_DENSE_WEIGHTS"\nexit 7\n'
    )
    fake.chmod(0o755)

    def step37_process(arguments: str, path: Path) -> tuple[subprocess.CompletedProcess, Path]:
        result = subprocess.run(
            [sys.executable, "-c", "from step37_ext.cli import main; main()", *arguments.split()],
            env=os.environ | {"PATH": str(path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return result, tmp_path / "sglang.arguments"

    return step37_process


def test_serve_becomes_the_printed_command(run, tmp_path):
    options = f"{H200} --concurrency 2 --dense-weights fp8"
    plan = json.loads(step37(f"command {options} --json").output)
    printed = plan["commands"][0]
    result, written = run(f"serve {options}", tmp_path)
    assert result.returncode == 7  # the fake's own
    assert ["sglang", *written.read_text().split()] == printed
    assert result.stdout == "dense weights: fp8\n"
    assert plan["environment"] == {"STEP37_DENSE_WEIGHTS": "fp8"}
    assert "STEP37_DENSE_WEIGHTS=fp8 " + " ".join(printed) in result.stderr


def test_serve_tells_the_server_what_was_planned_whatever_is_exported(run, tmp_path, monkeypatch):
    monkeypatch.setenv("STEP37_DENSE_WEIGHTS", "fp8")
    result, _ = run(f"serve {H200} --dense-weights bf16", tmp_path)
    assert result.stdout == "dense weights: bf16\n"
    assert result.stderr.startswith("STEP37_DENSE_WEIGHTS=bf16 sglang serve ")


def test_serve_does_not_start_what_does_not_fit(run, tmp_path):
    result, written = run(f"serve {TOO_LITTLE}", tmp_path)
    assert result.returncode == 1 and not written.exists()
    assert "does not fit" in result.stderr


def test_serve_without_sglang(run, tmp_path):
    (tmp_path / "empty").mkdir()
    result, _ = run(f"serve {H200}", tmp_path / "empty")
    assert result.returncode == 1 and "sglang is not on the PATH" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_table_is_drawn_only_on_a_terminal(monkeypatch, capsys):
    rows = [("total", 3 << 30, "a note")]
    print_rows(rows)
    plain = capsys.readouterr().out
    assert plain == f"{'total':<36}{'3.00':>8}  a note\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    print_rows(rows)
    assert "3.00" in (drawn := capsys.readouterr().out) and drawn.count("\n") > 2
