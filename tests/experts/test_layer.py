"""The whole expert layer in every format, against fp64 with a derived bound and the reference."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from step37_kernels.expert_weights import (
    BF16Experts,
    ExpertWeights,
    FP8Experts,
    NVFP4Experts,
    on_device,
)
from step37_kernels.experts.formats import FORMATS, least_arch
from step37_kernels.experts.layer import experts, prepare
from step37_kernels.formats import fp8_block, nvfp4
from step37_kernels.launch import counted
from step37_kernels.reference.experts import experts as reference
from tests.experts.bounds import expect

# Hidden states are of order one with a few up to 4, intermediates smaller: 448 codes of 6 for both.
INPUT_SCALES = (torch.tensor(4 / (6 * 448)), torch.tensor(8 / (6 * 448)))


def options_of(activations: str) -> dict[str, object]:
    """What `experts` and `expect` are told beside the batch."""
    scales = {"input_scales": INPUT_SCALES} if activations == "nvfp4" else {}
    return {"activations": activations} | scales


def make_weights(form: str, experts: int, hidden: int, size: int, offset: int = 0) -> ExpertWeights:
    """Random experts; NVFP4's gate and up global scales differ by 8."""
    gate, up = (torch.randn(experts, size + offset, hidden) * hidden**-0.5 for _ in range(2))
    down = torch.randn(experts, hidden, size + offset) * (size + offset) ** -0.5
    if form == "bf16":
        return BF16Experts(torch.cat([gate, up], 1).bfloat16(), down.bfloat16())
    if form == "fp8":  # a shard that begins `offset` channels inside a block
        gate, up, down = (fp8_block.quantize(part) for part in (gate, up, down))
        here = slice(offset, None)
        parts = gate.shard(here, None), up.shard(here, None), down.shard(None, here)
        return FP8Experts.of(*parts)
    return NVFP4Experts.of(*(nvfp4.quantize(part) for part in (gate, 8 * up, down)))


def run(device: torch.device, hidden: Tensor, weights: ExpertWeights, *args, **options) -> Tensor:
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    if "input_scales" in options:
        options["input_scales"] = tuple(scale.to(device) for scale in options["input_scales"])
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        least = least_arch(weights.format, options["activations"])
        if 10 * major + minor < least:
            pytest.skip(f"needs sm_{least}")
    prepared = prepare(on_device(weights, device), options["activations"])
    return experts(hidden.to(device), prepared, *moved, **options).cpu()


def batch(tokens: int, count: int, top_k: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.stack([torch.randperm(count)[:top_k] for _ in range(tokens)]).int()
    return torch.randn(tokens, hidden).bfloat16(), torch.rand(tokens, top_k), ids


@pytest.mark.parametrize(("form", "activations"), FORMATS)
@pytest.mark.parametrize(
    ("size", "offset", "limit"), [(160, 96, None), (320, 64, 0.5), (64, 0, 7.0)]
)
def test_layer_is_the_reference(
    device: torch.device, form: str, activations: str, size: int, offset: int, limit: float | None
) -> None:
    """Ragged blocks, an expert with no rows, ids of other ranks, a limit that bites."""
    torch.manual_seed(size)
    weights = make_weights(form, 4, 256, size, offset if form == "fp8" else 0)
    hidden, topk_weights, ids = batch(19, 8, 3, 256)
    ids[ids == 4] = 5  # expert 4, the first here, has no rows
    ids[3] = torch.tensor([-1, 100, 7])
    args = (topk_weights, ids, limit, 4)
    with counted() as launches:
        got = run(device, hidden, weights, *args, **options_of(activations))
    assert len(launches) <= (4 if activations == "same" else 5)
    expected = expect(
        hidden, weights, *args, **options_of(activations), narrow=device.type == "cuda"
    )
    assert ((got.double() - expected.output).abs() <= expected.bound).all()
    if activations == "same":  # the bound's own expectation is the reference's
        told = reference(hidden.float(), weights, *args)
        assert ((told.double() - expected.output).abs() <= expected.bound).all()
    # The bound says something. Where weights are rounded to e4m3 it lets all of a sum err to one
    # side; as a whole they do not, and two half steps (of weights, of the intermediate) remain.
    # Nor do the narrow sums of a GPU's FP8 products.
    wide = (form, activations) == ("nvfp4", "fp8") or (device.type == "cuda" and form == "fp8")
    assert wide or expected.bound.norm() < 0.2 * expected.output.norm()
    assert (got - expected.output).norm() < 2 * 2.0**-4 * expected.output.norm()
    if limit == 0.5:
        free = reference(hidden.float(), weights, topk_weights, ids, None, 4)
        assert (free - expected.output).norm() > 0.05 * expected.output.norm()


@pytest.mark.parametrize(("form", "activations"), FORMATS)
@pytest.mark.parametrize("size", [640, 1280])
def test_wide_shards(device: torch.device, form: str, activations: str, size: int) -> None:
    torch.manual_seed(size)
    weights = make_weights(form, 1, 128, size)
    hidden, topk_weights, ids = batch(2, 1, 1, 128)
    args = (topk_weights, ids, 0.0)  # a limit of zero is none
    got = run(device, hidden, weights, *args, **options_of(activations))
    expected = expect(
        hidden, weights, *args, **options_of(activations), narrow=device.type == "cuda"
    )
    assert ((got.double() - expected.output).abs() <= expected.bound).all()


@pytest.mark.parametrize(("form", "activations"), FORMATS)
def test_the_model_s_hidden_size_and_one_token(
    device: torch.device, form: str, activations: str
) -> None:
    torch.manual_seed(0)
    weights = make_weights(form, 2, 4096, 64)
    hidden, topk_weights, ids = batch(1, 2, 2, 4096)
    got = run(device, hidden, weights, topk_weights, ids, None, **options_of(activations))
    expected = expect(
        hidden,
        weights,
        topk_weights,
        ids,
        None,
        **options_of(activations),
        narrow=device.type == "cuda",
    )
    assert ((got.double() - expected.output).abs() <= expected.bound).all()


@pytest.mark.parametrize(("form", "activations"), FORMATS)
def test_rows_do_not_feel_their_batch_mates(
    device: torch.device, form: str, activations: str
) -> None:
    """Shuffled, with a NaN and an infinity in two of them: the other rows keep their bits."""
    torch.manual_seed(1)
    weights = make_weights(form, 3, 128, 64)
    hidden, topk_weights, ids = batch(18, 3, 2, 128)
    options = options_of(activations)
    clean = run(device, hidden, weights, topk_weights, ids, None, **options)
    assert torch.equal(clean, run(device, hidden, weights, topk_weights, ids, None, **options))
    order = torch.randperm(18)
    dirty = hidden[order]
    dirty[2, 5], dirty[9, 7] = float("nan"), float("inf")
    got = run(device, dirty, weights, topk_weights[order], ids[order], None, **options)
    kept = torch.tensor([row not in (2, 9) for row in range(18)])
    assert torch.equal(got[kept], clean[order][kept])
    assert not got[[2, 9]].isfinite().any(1).all()


@pytest.mark.parametrize(("form", "activations"), FORMATS)
def test_all_tokens_on_one_expert_and_the_shared_parts(
    device: torch.device, form: str, activations: str
) -> None:
    torch.manual_seed(2)
    weights = make_weights(form, 3, 128, 64)
    hidden, topk_weights, _ = batch(35, 3, 1, 128)
    ids = torch.full((35, 1), 2)  # int64
    shared = torch.randn(2, 35, 128)
    got = run(
        device, hidden, weights, topk_weights, ids, None,
        **options_of(activations), shared=shared.to(device),
    )  # fmt: skip
    expected = expect(
        hidden,
        weights,
        topk_weights,
        ids,
        None,
        **options_of(activations),
        narrow=device.type == "cuda",
    )
    output = expected.output + shared.double().sum(0)
    # The shared parts join two more fp32 sums and the last rounding.
    bound = expected.bound + (2.0**-8 + 2.0**-22) * shared.double().abs().sum(0)
    assert ((got.double() - output).abs() <= bound).all()


@pytest.mark.parametrize(("form", "activations"), FORMATS)
def test_no_tokens_and_no_local_tokens(device: torch.device, form: str, activations: str) -> None:
    weights = make_weights(form, 2, 128, 64)
    hidden, topk_weights, ids = batch(3, 2, 2, 128)
    options = options_of(activations)
    with counted() as launches:
        none = run(device, hidden[:0], weights, topk_weights[:0], ids[:0], None, **options)
    assert none.shape == (0, 128) and not launches
    elsewhere = run(device, hidden, weights, topk_weights, ids + 2, None, **options)
    assert (elsewhere == 0).all()


def test_the_list_of_formats_is_the_layer_s_own(device: torch.device) -> None:
    weights = on_device(make_weights("bf16", 1, 128, 64), device)
    hidden, topk_weights, ids = (t.to(device) for t in batch(1, 1, 1, 128))
    with pytest.raises(ValueError, match="activations is 'int8' with bf16 weights") as refusal:
        experts(hidden, weights, topk_weights, ids, None, activations="int8")
    named = re.findall(r"(\w+) with '(\w+)'", str(refusal.value).partition("expected")[2])
    assert sorted(named) == sorted(FORMATS)


def test_bad_input_is_refused_before_a_launch(device: torch.device) -> None:
    weights = on_device(make_weights("bf16", 2, 128, 64), device)
    hidden, topk_weights, ids = (t.to(device) for t in batch(3, 2, 2, 128))
    with counted() as launches:
        with pytest.raises(ValueError, match=r"hidden has shape \[3, 64\], expected \[any, 128\]"):
            experts(hidden[:, :64], weights, topk_weights, ids, None)
        with pytest.raises(ValueError, match="hidden has dtype torch.float32"):
            experts(hidden.float(), weights, topk_weights, ids, None)
        with pytest.raises(ValueError, match="activations is 'fp8' with bf16 weights, expected"):
            experts(hidden, weights, topk_weights, ids, None, activations="fp8")
        with pytest.raises(ValueError, match=r"topk_ids has shape \[2, 2\]"):
            experts(hidden, weights, topk_weights, ids[:2], None)
        with pytest.raises(ValueError, match="limit is -1.0"):
            experts(hidden, weights, topk_weights, ids, -1.0)
        with pytest.raises(ValueError, match="topk_weights is on meta"):
            experts(hidden, weights, topk_weights.to("meta"), ids, None)
    assert not [name for name in launches if not name.startswith("sort")]


def test_weights_that_cannot_be_served_are_refused_at_load(device: torch.device) -> None:
    weights = on_device(make_weights("fp8", 2, 128, 64), device)
    weights.w2.view(torch.uint8)[1, 5, 7] = 0x7F
    with pytest.raises(ValueError, match="w2 of expert 1 holds NaN"):
        prepare(weights)
    weights = on_device(make_weights("nvfp4", 2, 128, 64), device)
    weights.w13_scale.view(torch.uint8)[0, 3, 1] = 0xFF
    with pytest.raises(ValueError, match="NaN"):
        prepare(weights)


def test_debug_names_the_token_with_a_wrong_id(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = on_device(make_weights("bf16", 2, 128, 64), device)
    hidden, topk_weights, ids = (t.to(device) for t in batch(3, 2, 2, 128))
    ids[1, 1] = 9
    experts(hidden, weights, topk_weights, ids, None)  # without it nothing is read back
    monkeypatch.setenv("STEP37_DEBUG", "1")
    with pytest.raises(ValueError, match=r"topk_ids\[1, 1\] is 9, expected -1 to 1 \(token 1"):
        experts(hidden, weights, topk_weights, ids, None)
    experts(hidden, weights, topk_weights, ids, None, total_experts=16)
