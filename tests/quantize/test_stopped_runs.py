"""Runs that are killed, folders that are not free, disks that are full."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from step37_ext.checkpoint.headers import INDEX_FILE
from step37_ext.model.parallel import Parallel
from step37_ext.quantize import destination, durable
from step37_ext.quantize.destination import STATE
from step37_ext.quantize.shard_file import ShardWriter
from step37_ext.start_checks import check_config

BYTES_BEFORE_THE_END = 9_000_000


@pytest.fixture
def killed(untrained, tmp_path, run) -> Callable[[], Path]:
    """A folder in which a run was killed (SIGKILL) while it wrote its fourth file or so."""

    def make() -> Path:
        out = tmp_path / "out"
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)  # the parent's threads do not exist here
                _die_after(BYTES_BEFORE_THE_END)
                run(untrained["bf16"], out, "nvfp4")
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        return out

    return make


def _die_after(count: int) -> None:
    append, written = ShardWriter.append, 0

    def count_and_append(self, name, piece):
        nonlocal written
        written += append(self, name, piece)
        if written > count:
            os.kill(os.getpid(), signal.SIGKILL)
        return piece.nbytes

    ShardWriter.append = count_and_append  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def whole(untrained, tmp_path_factory) -> Callable[..., Path]:
    """The same checkpoint, written without a stop."""
    made: list[Path] = []

    def make(run) -> Path:
        if not made:
            made.append(tmp_path_factory.mktemp("whole") / "out")
            run(untrained["bf16"], made[0], "nvfp4")
        return made[0]

    return make


def assert_equal_folders(a: Path, b: Path) -> None:
    names = sorted(path.name for path in a.iterdir())
    assert sorted(path.name for path in b.iterdir()) == names
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_a_killed_run_goes_on(untrained, killed, run, whole):
    out = killed()
    assert list(out.glob(".*.partial")) and not (out / INDEX_FILE).exists()
    with pytest.raises(ValueError, match="config.json does not exist"):
        check_config(out, Parallel(), None)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert 2 <= len(before) < len(list(whole(run).glob("*.safetensors")))
    said = run(untrained["bf16"], out, "nvfp4")
    assert f"{len(before)} files of an earlier run were verified and kept" in said
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert_equal_folders(out, whole(run))


def test_a_damaged_file_is_written_again(untrained, killed, run, whole):
    out = killed()
    first, second = sorted(out.glob("*.safetensors"))[:2]
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-1])
    said = run(untrained["bf16"], out, "nvfp4")
    assert f"{first.name} of an earlier run was damaged: written again" in said
    assert f"{second.name} of an earlier run was damaged: written again" in said
    assert_equal_folders(out, whole(run))


def test_a_run_goes_on_with_the_same_arguments_only(untrained, killed, run, text):
    out = killed()
    for source, target, options, named in (
        (untrained["bf16"], "fp8", {}, r"another format \(nvfp4, here fp8\)"),
        (untrained["fp8"], "nvfp4", {}, "another source "),
        (untrained["bf16"], "nvfp4", {"calibration_text": text}, "another calibration text"),
    ):
        with pytest.raises(ValueError, match=named):
            run(source, out, target, **options)


def test_a_source_that_has_changed_is_not_mixed_in(untrained, killed, run, tmp_path, monkeypatch):
    out = killed()
    plan = json.loads((out / STATE / "plan.json").read_text())
    plan["source files"]["model-00001-of-00003.safetensors"][1] -= 1
    (out / STATE / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="another source files"):
        run(untrained["bf16"], out, "nvfp4")


@pytest.mark.parametrize("stop", ["config.json", INDEX_FILE])
def test_nothing_looks_whole_before_the_index(untrained, tmp_path, run, monkeypatch, whole, stop):
    written = durable.write_json

    def full_disk(path, value):
        if path.name == f".{stop}.partial":
            path.write_text("{")
            raise OSError(28, "No space left on device")
        written(path, value)

    out = tmp_path / "out"
    monkeypatch.setattr(durable, "write_json", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(untrained["bf16"], out, "nvfp4")
    assert not (out / INDEX_FILE).exists() and not list(out.glob(".*.partial"))
    monkeypatch.setattr(durable, "write_json", written)
    run(untrained["bf16"], out, "nvfp4")
    assert_equal_folders(out, whole(run))


def test_finished_and_foreign_folders_are_refused_and_kept(untrained, tmp_path, run, whole):
    finished = whole(run)
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    with pytest.raises(ValueError, match="holds a finished checkpoint, which is never overwritten"):
        run(untrained["bf16"], finished, "nvfp4")
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        run(untrained["bf16"], foreign, "nvfp4")
    with pytest.raises(ValueError, match="is a file"):
        run(untrained["bf16"], foreign / "notes.txt", "nvfp4")
    with pytest.raises(ValueError, match="holds a finished checkpoint"):
        run(untrained["bf16"], untrained["bf16"], "nvfp4")
    assert [path.name for path in foreign.iterdir()] == ["notes.txt"]


def test_two_runs_in_one_folder_are_refused(untrained, killed, run):
    out = killed()
    with (out / STATE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another step37 quantize is at work there"):
            run(untrained["bf16"], out, "nvfp4")


def test_a_full_disk_is_refused_before_anything_is_written(untrained, tmp_path, run, monkeypatch):
    monkeypatch.setattr(
        destination.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000)
    )
    with pytest.raises(ValueError, match=r"needs 0.015 GB, 0.010 GB are free"):
        run(untrained["bf16"], tmp_path / "deep" / "out", "nvfp4")
    assert not (tmp_path / "deep").exists()


def test_what_is_there_already_needs_no_disk(untrained, killed, run, whole, monkeypatch):
    out = killed()
    half = sum(path.stat().st_size for path in out.glob(".*.partial"))
    done = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert half > 0 and done > 0

    def with_free(free: int) -> str:
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(destination.shutil, "disk_usage", lambda _: usage)
        return run(untrained["bf16"], out, "nvfp4")

    # Configs, index and report, made at the end, are not counted: less than 100 kB.
    total = sum(path.stat().st_size for path in whole(run).iterdir())
    with pytest.raises(ValueError, match="are free"):
        with_free(total - done - half - 100_000)
    assert "free" in with_free(total - done - half + 100_000)
