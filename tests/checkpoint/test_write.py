"""Writing all or nothing, refusing what is in the way, and the cache of trained weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from step37_ext.checkpoint import cache, make
from step37_ext.checkpoint.init import initial_weights
from step37_ext.checkpoint.make import make_tiny, random_checkpoint
from step37_ext.checkpoint.release_layout import Calibration
from step37_ext.checkpoint.spec import TINY, TinySpec
from step37_ext.checkpoint.train import Recipe
from step37_ext.cli import main

Trained = tuple[dict[str, torch.Tensor], Calibration]


def test_an_error_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(make, "write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        random_checkpoint(tmp_path / "out", "bf16", TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_used_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        make_tiny(tmp_path, "bf16")
    with pytest.raises(ValueError, match="is a file"):
        make_tiny(tmp_path / "notes.txt", "bf16")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_unknown_format_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'int4': must be one of bf16, fp8, nvfp4"):
        make_tiny(tmp_path / "out", "int4")  # type: ignore[arg-type]


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "bf16", TINY)
    assert (tmp_path / "config.json").is_file()
    assert (tmp_path / "model-00001-of-00003.safetensors").stat().st_mode & 0o044


def test_the_command_line_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = CliRunner().invoke(main, ["make-tiny", str(tmp_path), "--format", "bf16"])
    assert result.exit_code == 1
    assert f"output {tmp_path}: is not empty" in result.output


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"sliding_heads": 5}, "sliding_heads = 5"),
        ({"top_k": 9}, "top_k = 9"),
        ({"expert_intermediate": 100}, "expert_intermediate = 100"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TinySpec(**sizes)  # type: ignore[arg-type]


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An empty cache, and a stand-in for training that counts its calls."""
    calls: list[int] = []

    def teach(spec: TinySpec, recipe: Recipe, *, quiet: bool) -> Trained:
        calls.append(recipe.seed)
        moe = (len(spec.moe_layers), spec.experts)
        layers = torch.arange(1.0, 1 + spec.layers)
        amax = torch.ones(moe)
        return initial_weights(spec), Calibration(layers, 2 * layers, amax, 2 * amax)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("step37_ext.checkpoint.teach.teach", teach)
    return calls


def test_the_second_time_comes_from_the_cache(counted: list[int]) -> None:
    first, first_calibration = cache.trained_weights(quiet=True)
    second, second_calibration = cache.trained_weights(quiet=True)
    assert len(counted) == 1
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(first_calibration.v, second_calibration.v)
    file = cache.cache_file(Recipe())
    # No half-written file is left; the lock stays.
    assert {path.name for path in file.parent.iterdir()} == {file.name, f"{file.stem}.lock"}


@pytest.mark.parametrize("damage", ["cut short", "cut to nothing", "other tensors", "not finite"])
def test_a_damaged_cache_file_is_replaced(counted: list[int], damage: str) -> None:
    from safetensors.torch import load_file, save_file

    cache.trained_weights(quiet=True)
    file = cache.cache_file(Recipe())
    tensors = load_file(file)
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "cut to nothing":
        file.write_bytes(b"")
    elif damage == "other tensors":
        del tensors["lm_head.weight"]
        save_file(tensors, file)
    else:
        tensors["lm_head.weight"][0, 0] = float("nan")
        save_file(tensors, file)
    cache.trained_weights(quiet=True)
    assert len(counted) == 2
    cache.trained_weights(quiet=True)
    assert len(counted) == 2


def test_the_cache_knows_recipes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    ours, other = cache.cache_file(Recipe()), cache.cache_file(Recipe(steps=7))
    assert ours != other
    assert ours == cache.cache_file(Recipe())
    assert ours.parent == Path("/somewhere/step37_ext")
