"""`step37 doctor`: every kernel is tried, and what is wrong is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from step37_ext.doctor import self_test
from step37_ext.doctor.command import examine
from step37_kernels import dispatch
from step37_kernels.dispatch import Target

CPU = Target("cpu", None, "-")


def doctor(*arguments: str) -> tuple[int, dict]:
    environment = {k: v for k, v in os.environ.items() if k != "STEP37_IMPL"}
    command = [str(Path(sys.executable).with_name("step37")), "doctor", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    return done.returncode, json.loads(done.stdout)


def test_every_kernel_is_tried_and_a_checkpoint_checked(untrained: dict[str, Path]) -> None:
    status, found = doctor("--checkpoint", str(untrained["fp8"]))
    assert status == 0 and found["problems"] == []
    assert found["checkpoint"] == {
        "folder": str(untrained["fp8"]), "whole": True, "format": "fp8"
    }  # fmt: skip
    tried = [(c["operation"], c["weights"]) for c in found["self_test"]]
    assert len(tried) == 15 and {o for o, _ in tried} == set(dispatch.OPERATIONS)
    ran = "triton" if torch.cuda.is_available() else "interpret"
    assert all(c["passed"] and c["implementation"] == ran for c in found["self_test"])
    assert {k["operation"] for k in found["kernels"]} == set(dispatch.OPERATIONS)


def test_a_damaged_checkpoint_is_a_problem(
    untrained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in untrained["bf16"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    monkeypatch.setattr(self_test, "run_checks", lambda target: [])
    found = examine(tmp_path)
    assert found["checkpoint"]["whole"] is False and shard.name in found["problems"][0]


def test_a_kernel_that_is_wrong_or_fails_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = dispatch.choose

    def choose(operation: str, target: Target) -> dispatch.Implementation:
        chosen = right(operation, target)
        if operation == "attend":
            return dispatch.Implementation(
                "wrong", operation, "", lambda *a, **k: 1.1 * chosen(*a, **k), chosen.prepare
            )
        if operation == "route":
            return dispatch.Implementation("broken", operation, "", 1 / 1, chosen.prepare)  # type: ignore[arg-type]
        return chosen

    monkeypatch.delenv("STEP37_IMPL", raising=False)
    monkeypatch.setattr(dispatch, "choose", choose)
    checks = {(c.operation, c.weights): c for c in self_test.run_checks(CPU)}
    assert "relative error 0.1" in checks["attend", "fp8 cache, decode"].problem
    assert "TypeError" in checks["route", "-"].problem and checks["route", "-"].error is None
    assert checks["experts", "nvfp4"].passed


def test_what_cannot_even_be_made_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    for maker in ("_route", "_fp8", "_linear", "_cache", "_values", "_batch", "_page_tables"):
        monkeypatch.setattr(self_test, maker, fail)
    problems = [c.problem for c in self_test.run_checks(CPU) if c.operation != "activation"]
    assert len(problems) == 14 and all("no kernel image" in problem for problem in problems)


@pytest.mark.parametrize(
    "capability, caches", [((8, 0), ["bf16"]), ((8, 9), ["bf16", "fp8"]), (None, ["bf16", "fp8"])]
)
def test_an_fp8_cache_is_tried_where_a_server_takes_it(capability, caches) -> None:
    of = self_test._caches(Target("cuda" if capability else "cpu", capability, "-"))
    assert [name for name, _ in of] == caches
