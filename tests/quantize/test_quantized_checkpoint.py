"""What `step37 quantize` writes, against the small model's own writer and other libraries."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from step37_ext.checkpoint.dequantised import dequantised_weights
from step37_ext.checkpoint.headers import INDEX_FILE, TensorHeader
from step37_ext.cli import main
from step37_ext.deploy.memory import release
from step37_ext.model.parallel import Parallel
from step37_ext.model.tensors import expected_tensors
from step37_ext.quantize import convert
from step37_ext.quantize.plan import Shard, Stored, Task, plan_shards
from step37_ext.quantize.report import REPORT_FILE
from step37_ext.quantize.shard_file import ShardWriter, is_intact
from step37_ext.quantize.source import Source
from step37_ext.quantize.workers import convert_all
from step37_ext.start_checks import check_config, check_tensors
from step37_kernels.formats import nvfp4

STATIC = ("k_scale", "v_scale", "input_scale")


def config(folder: Path, name: str = "config.json") -> dict:
    return json.loads((folder / name).read_text())


def check(folder: Path) -> None:
    check_tensors(folder, check_config(folder, Parallel(), None))


def root_of_ratio(pair: torch.Tensor) -> float:
    return (pair[0] / pair[1]).sqrt().item()


def test_fp8_equals_the_small_models_writer(untrained, tmp_path, run, read, same):
    out = tmp_path / "out"
    run(untrained["bf16"], out, "fp8")
    check(out)
    ours, expected = read(out), read(untrained["fp8"])
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        if name.endswith("moe.gate.weight"):  # kept as it is; the writer stores it in float32
            assert tensor.dtype == torch.bfloat16
            tensor = tensor.float()
        assert same(tensor, expected[name]), name
    assert config(out) == config(untrained["fp8"])
    made = {INDEX_FILE, "config.json", REPORT_FILE}
    for path in untrained["fp8"].iterdir():
        if path.suffix != ".safetensors" and path.name not in made:
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_nvfp4_equals_the_small_models_writer(untrained, tmp_path, run, read, same, text):
    plain, calibrated = tmp_path / "plain", tmp_path / "calibrated"
    run(untrained["bf16"], plain, "nvfp4")
    run(untrained["bf16"], calibrated, "nvfp4", calibration_text=text)
    check(plain)
    check(calibrated)
    expected = read(untrained["nvfp4"])
    without, with_scales = read(plain), read(calibrated)
    assert with_scales.keys() == expected.keys()
    assert without.keys() == {name for name in expected if not name.endswith(STATIC)}
    for name, tensor in with_scales.items():
        if name.endswith(STATIC):  # of another text
            assert (tensor.dtype, tensor.shape) == (torch.float32, expected[name].shape)
            assert bool((tensor > 0).all())
        else:
            assert same(tensor, expected[name]) and same(without[name], expected[name]), name
    for file in ("config.json", "hf_quant_config.json"):
        assert config(calibrated, file) == config(untrained["nvfp4"], file)
    # A checkpoint without scales must not ask for an FP8 cache.
    assert config(plain)["quantization_config"]["kv_cache_scheme"] is None
    assert config(plain, "hf_quant_config.json")["quantization"]["kv_cache_quant_algo"] is None


def test_fp8_to_nvfp4_starts_from_what_fp8_stands_for(untrained, tmp_path, run, read, same):
    out = tmp_path / "out"
    run(untrained["fp8"], out, "nvfp4")
    check(out)
    ours, source = read(out), dequantised_weights(untrained["fp8"])
    assert "model.language_model.layers.1.moe.gate.weight" in ours
    for layer in (1, 2, 3):
        for projection in ("gate", "up", "down"):
            name = f"layers.{layer}.moe.{projection}_proj.weight"
            expected = nvfp4.quantize(source[f"model.{name}"])
            stored = f"model.language_model.{name}"
            assert same(ours[stored], expected.packed)
            assert same(ours[f"{stored}_scale"], expected.block_scale)
            assert same(ours[f"{stored}_scale_2"], expected.global_scale)
    assert not any(name.endswith("scale_inv") for name in ours)


@pytest.mark.parametrize("target", ["fp8", "nvfp4"])
def test_report_is_the_error_of_the_files(untrained, tmp_path, run, target):
    out = tmp_path / "out"
    run(untrained["bf16"], out, target)
    errors = config(out, REPORT_FILE)["errors"]
    source, written = dequantised_weights(untrained["bf16"]), dequantised_weights(out)
    assert list(errors["layers"]) == ["1", "2", "3"]
    for layer, entry in errors["layers"].items():
        total = torch.zeros(2, dtype=torch.float64)
        for projection in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.{layer}.moe.{projection}.weight"
            weight = source[name].double()
            sums = [(written[name].double() - weight).square().sum((1, 2))]
            sums = torch.stack([*sums, weight.square().sum((1, 2))])
            each = (sums[0] / sums[1]).sqrt()
            # Differences of numbers that fp32 holds exactly, each rounded once: 2^-24 apart.
            found = entry[projection]
            assert found["error"] == pytest.approx(root_of_ratio(sums.sum(1)), rel=1e-6)
            assert found["worst_expert"] == each.argmax()
            assert found["worst_expert_error"] == pytest.approx(each.max().item(), rel=1e-6)
            total += sums.sum(1)
        assert entry["error"] == pytest.approx(root_of_ratio(total), rel=1e-6)
    # Uniform rounding steps relative to a normal distribution: e4m3 keeps 4 bits, e2m1 2.
    assert errors["all"] == pytest.approx({"fp8": 0.026, "nvfp4": 0.095}[target], rel=0.1)


def test_no_more_than_one_experts_matrix_is_held(untrained, tmp_path, run, monkeypatch):
    quantized, seen = convert.quantized, set()

    def note(matrix, target):
        seen.add(tuple(matrix.shape))
        return quantized(matrix, target)

    monkeypatch.setattr(convert, "quantized", note)
    run(untrained["bf16"], tmp_path / "out", "fp8")
    assert seen == {(384, 256), (256, 384)}


def test_the_releases_own_sizes_and_counts():
    """13 files of 124,385,012,840 bytes in 1888 tensors: NVFP4's first index, without MTP layers.

    The FP8 release has 1597 tensors, 51 of them in MTP layers and no cache scales.
    """
    model = release()
    headers = {
        name: TensorHeader(spec.shape, "F32" if name.endswith("router_bias") else "BF16", "file")
        for name, spec in expected_tensors(model.text, model.vision, "bf16").items()
    }
    shards = plan_shards(headers, model.text, "nvfp4", calibrated=True)
    tensors = [tensor for shard in shards for tensor in shard.outputs]
    assert len(tensors) == 1888
    assert sum(tensor.nbytes for tensor in tensors) == 124_385_012_840
    fp8 = plan_shards(headers, model.text, "fp8", calibrated=False)
    assert sum(len(shard.outputs) for shard in fp8) == 1597 - 51


def test_layers_are_in_order_and_a_large_tensor_is_alone(monkeypatch):
    model = release()
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in (10, 9, 2)]
    headers = {name: TensorHeader((1_000_000,), "F32", "file") for name in names}
    headers["lm_head.weight"] = TensorHeader((2_000_000,), "F32", "file")
    shards = plan_shards(headers, model.text, "fp8", calibrated=False)
    assert [tensor.name for shard in shards for tensor in shard.outputs] == [
        "lm_head.weight",
        *reversed(names),
    ]
    assert [len(shard.outputs) for shard in shards] == [1, 1, 1, 1]


def test_files_are_those_of_the_safetensors_library(tmp_path):
    """Names, types and sizes that need the library's order, padding and escapes."""
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.arange(7, dtype=torch.uint8),
        "c": torch.tensor(2.5),
        "z": torch.randn(5).to(torch.float8_e4m3fn),
        "ä": torch.randn(3).half(),
        "bias": torch.randn(2),
    }
    types = {"b": "BF16", "a": "U8", "c": "F32", "z": "F8_E4M3", "ä": "F16", "bias": "F32"}
    stored = [Stored(name, types[name], tuple(t.shape)) for name, t in tensors.items()]
    with ShardWriter(tmp_path / "ours", stored) as writer:
        writer.append("b", tensors["b"][:1])
        for name in ("a", "z", "ä", "c", "bias"):
            writer.append(name, tensors[name])
        with pytest.raises(ValueError, match="b: 10 bytes written, expected 30"):
            writer.digests()
        writer.append("b", tensors["b"][1:])
        digests = writer.digests()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert is_intact(tmp_path / "ours", stored, digests)
    assert not is_intact(tmp_path / "ours", stored, digests | {"c": digests["a"]})
    assert not is_intact(tmp_path / "ours", stored[:-1], digests)


def test_two_processes_write_the_same_files(untrained, tmp_path, run):
    one, two = tmp_path / "one", tmp_path / "two"
    run(untrained["bf16"], one, "nvfp4")
    run(untrained["bf16"], two, "nvfp4", jobs=2)
    files = sorted(path.name for path in one.iterdir())
    assert sorted(path.name for path in two.iterdir()) == files
    for name in files:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_a_killed_worker_is_told_of(untrained, tmp_path):
    def kill_one(_: int) -> None:
        for process in multiprocessing.active_children()[:1]:
            os.kill(process.pid, 9)

    places = convert.Places(untrained["bf16"], tmp_path, tmp_path, None, "fp8")
    stored = Stored("model.norm.weight", "BF16", (256,))
    shards = [Shard("one.safetensors", (Task("copy", stored.name, (stored,)),))]
    with pytest.raises(RuntimeError, match="a worker process was killed.*fewer --jobs"):
        convert_all(places, shards, 2, kill_one)
    for process in multiprocessing.active_children():
        process.join(10)  # it was told to end
    assert not multiprocessing.active_children()


def test_weights_that_are_not_finite_are_named(untrained, tmp_path, run):
    source = tmp_path / "source"
    source.mkdir()
    name = "model.layers.2.moe.up_proj.weight"
    for path in untrained["bf16"].iterdir():
        if path.suffix == ".safetensors" and name in (tensors := load_file(path)):
            tensors[name][5, 0, 0] = float("inf")
            save_file(tensors, source / path.name, metadata={"format": "pt"})
        else:
            (source / path.name).symlink_to(path)
    with pytest.raises(ValueError, match=f"{name}, expert 5: weight holds NaN or infinity"):
        run(source, tmp_path / "out", "fp8", jobs=2)
    assert not (tmp_path / "out" / INDEX_FILE).exists()


def test_sources_that_cannot_be_quantised(untrained, tmp_path, run):
    for source, target, message in (
        (untrained["nvfp4"], "nvfp4", "its experts are in nvfp4; nvfp4 is made from bf16 or fp8"),
        (untrained["fp8"], "fp8", "its experts are in fp8; fp8 is made from bf16"),
        (tmp_path / "nowhere", "fp8", "is neither a folder nor a repository"),
    ):
        with pytest.raises(ValueError, match=message):
            run(source, tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


def test_the_command(untrained, tmp_path):
    runner = CliRunner()
    out = tmp_path / "out"
    result = runner.invoke(main, ["quantize", str(untrained["bf16"]), str(out), "--format", "fp8"])
    assert result.exit_code == 0, result.output
    assert "relative L2 error" in result.output and f"{out}: finished" in result.output
    again = runner.invoke(main, ["quantize", str(untrained["bf16"]), str(out), "--format", "fp8"])
    assert again.exit_code == 1
    assert "Error: output" in again.output and "finished checkpoint" in again.output
    assert "Examples:" in runner.invoke(main, ["quantize", "--help"]).output


def test_one_expert_is_what_the_whole_stack_says(untrained, same):
    source, whole = Source(untrained["fp8"]), dequantised_weights(untrained["fp8"])
    name = "model.layers.3.moe.down_proj.weight"
    assert same(source.expert(name, 6), whole[name][6])
