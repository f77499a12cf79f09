"""Scales from a text, against transformers' own model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from step37_ext.checkpoint.calibrate import calibrate as calibrate_with_transformers
from step37_ext.checkpoint.oracle import Example, transformers_model
from step37_ext.checkpoint.release_layout import static_scales
from step37_ext.checkpoint.spec import TINY
from step37_ext.model.parallel import Parallel
from step37_ext.quantize import run as run_module
from step37_ext.quantize.calibrate import SEQUENCE_TOKENS, calibrate, token_sequences
from step37_ext.quantize.report import REPORT_FILE
from step37_ext.quantize.source import Source
from step37_ext.start_checks import check_config


def text_shape(folder: Path):
    return check_config(folder, Parallel(), None).text


@pytest.mark.parametrize("weight_format", ["bf16", "fp8"])
def test_scales_are_those_of_transformers(untrained, weight_format):
    folder = untrained[weight_format]
    generator = torch.Generator().manual_seed(3)
    # Longer than the window of 64, of unlike lengths.
    ids = [torch.randint(3, TINY.vocab_size, (n,), generator=generator) for n in (150, 1, 70)]
    ours, unrouted = calibrate(Source(folder), text_shape(folder), ids, lambda: None)
    examples = [Example(str(len(i)), i.tolist(), [], None) for i in ids]
    theirs = calibrate_with_transformers(TINY, transformers_model(folder), examples)
    for name in ("k", "v", "expert_input", "expert_product"):
        # Both are fp32: sums of at most 512 products in another order, over four layers, so that
        # 4 * 512 * 2^-24 = 1.2e-4 of the largest terms bounds the difference.
        found, expected = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(found, expected, rtol=1.2e-4, atol=0, msg=name)
    assert unrouted == [0, 0, 0]


def test_experts_without_a_token_get_their_layers_largest(untrained):
    folder = untrained["bf16"]
    ids = [torch.tensor([5])]  # one token goes to two of eight experts
    result, unrouted = calibrate(Source(folder), text_shape(folder), ids, lambda: None)
    assert unrouted == [6, 6, 6]
    for amax in (result.expert_input, result.expert_product):
        largest = amax.amax(1, keepdim=True)
        assert bool(((amax == largest).sum(1) >= 7).all())


def test_the_checkpoint_holds_them(untrained, tmp_path, run, read, text, monkeypatch):
    """FP8 takes the cache's scales, NVFP4 `input_scale` too; a second run does not calibrate."""
    folder = untrained["bf16"]
    ids = token_sequences(folder, text)
    expected = static_scales(
        TINY, calibrate(Source(folder), text_shape(folder), ids, lambda: None)[0]
    )
    for target in ("fp8", "nvfp4"):
        run(folder, tmp_path / target, target, calibration_text=text)
        stored = read(tmp_path / target)
        found = {
            name.replace("model.language_model.", "model."): tensor
            for name, tensor in stored.items()
            if name.endswith(("k_scale", "v_scale", "input_scale"))
        }
        wanted = {n: t for n, t in expected.items() if target == "nvfp4" or "moe" not in n}
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert f'"tokens": {len(ids[0])}' in (tmp_path / target / REPORT_FILE).read_text()


def test_a_stopped_run_keeps_its_calibration(untrained, tmp_path, run, text, monkeypatch):
    convert_all = run_module.convert_all

    def stopped(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module, "convert_all", stopped)
    with pytest.raises(OSError, match="No space left"):
        run(untrained["bf16"], tmp_path / "out", "nvfp4", calibration_text=text)
    monkeypatch.setattr(run_module, "convert_all", convert_all)
    monkeypatch.setattr(run_module, "calibrate", stopped)
    run(untrained["bf16"], tmp_path / "out", "nvfp4", calibration_text=text)
    assert '"sequences": 1' in (tmp_path / "out" / REPORT_FILE).read_text()


def test_a_text_is_cut_into_sequences_that_begin_with_bos(untrained, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("The capital of Norway is Oslo. " * 1000, encoding="utf-8")
    folder = untrained["bf16"]
    sequences = token_sequences(folder, file)
    assert len(sequences) > 2
    assert {len(ids) for ids in sequences[:-1]} == {SEQUENCE_TOKENS}
    assert 1 < len(sequences[-1]) <= SEQUENCE_TOKENS
    assert all(ids[0] == 0 for ids in sequences)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rest = [token for ids in sequences for token in ids[1:].tolist()]
    assert rest == tokenizer.encode(file.read_text(), add_special_tokens=False).ids
    file.write_text(tokenizer.decode([0], skip_special_tokens=False) + "Oslo", encoding="utf-8")
    assert [ids.tolist().count(0) for ids in token_sequences(folder, file)] == [1]


def test_texts_that_are_refused(untrained, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("")
    with pytest.raises(ValueError, match="text.txt: is empty"):
        token_sequences(untrained["bf16"], file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="text.txt: is not UTF-8"):
        token_sequences(untrained["bf16"], file)
    file.write_text("text")
    with pytest.raises(ValueError, match="tokenizer.json is missing"):
        token_sequences(tmp_path, file)
