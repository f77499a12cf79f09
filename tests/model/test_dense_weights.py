"""The weights beside the routed experts in FP8: which they are, and what the model then says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from expected import check, noise
from harness import Request, Worker
from live_bytes import LiveBytes
from torch import Tensor

from step37_ext.checkpoint.oracle import transformers_model
from step37_ext.checkpoint.spec import TINY
from step37_ext.checkpoint.weight_format import WeightFormat
from step37_ext.model.dense_format import dense_format
from step37_ext.model.dense_weights import (
    FP8Projection,
    loadable,
    quantize_projection,
)
from step37_kernels import dispatch

QUANTIZED = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    "shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj",
)  # fmt: skip
"""Ends of the names of transformers' linear layers whose weights become FP8."""


def through_fp8(weight: Tensor) -> Tensor:
    """The weight as FP8 rows hold it, by ml_dtypes and none of our code."""
    exact = weight.float().numpy()
    exponent = np.ceil(np.log2(np.abs(exact).max(1, keepdims=True) / 448))
    scale = np.exp2(exponent).astype(np.float32)
    codes = (exact / scale).astype(ml_dtypes.float8_e4m3fn)
    return torch.from_numpy(codes.astype(np.float32) * scale)


def test_the_model_is_transformers_with_these_weights_in_fp8(
    worker: Worker, tiny_with_plain_cache: Callable[[WeightFormat], Path]
) -> None:
    """Every logprob to 1e-3: all of these layers, and no other, are FP8."""
    folder = tiny_with_plain_cache("nvfp4")
    model = transformers_model(folder)
    found = 0
    for name, module in model.model.language_model.layers.named_modules():
        if name.endswith(QUANTIZED) and isinstance(module, torch.nn.Linear):
            module.weight.data = through_fp8(module.weight.data)
            found += 1
    moe = len(TINY.moe_layers)
    assert found == TINY.layers * 4 + (TINY.layers - moe) * 3 + moe * 3
    worker.load(folder, dense="fp8")
    prompts = (noise(3 * TINY.sliding_window), noise(9, 2))
    for answer in worker.ask(*(Request(prompt, new_tokens=3) for prompt in prompts)):
        check(model, answer)
    left = {name for name in worker.stored_types() if name.endswith("_proj.weight")}
    assert left == {f"model.layers.{n}.self_attn.g_proj.weight" for n in range(TINY.layers)}


def test_the_kernels_say_what_the_reference_says(
    worker: Worker, untrained: dict[WeightFormat, Path]
) -> None:
    """Weights from a seed: trained ones differ, and a near tie of a router may go either way."""
    request, answers = Request(noise(TINY.sliding_window + 9), new_tokens=1), []
    for implementation in ("reference", "interpret"):
        worker.load(untrained["bf16"], "--dtype bfloat16", implementation, dense="fp8")
        assert worker.implementations()["linear"] == {implementation}
        answers += worker.ask(request)
    reference, kernels = answers
    # Both compute in bf16 between operations: 2^-8 of a hidden state, and its way to the logits.
    # Where a router's near tie goes the other way, that position and what sees it differ by more.
    differences = torch.tensor(kernels.logprobs) - torch.tensor(reference.logprobs)
    assert differences.abs().quantile(0.9) <= 0.1
    assert kernels.logprobs != reference.logprobs


def test_only_what_is_known_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, expected in ((None, "bf16"), ("", "bf16"), ("bf16", "bf16"), ("fp8", "fp8")):
        if asked is None:
            monkeypatch.delenv("STEP37_DENSE_WEIGHTS", raising=False)
        else:
            monkeypatch.setenv("STEP37_DENSE_WEIGHTS", asked)
        assert dense_format() == expected
    monkeypatch.setenv("STEP37_DENSE_WEIGHTS", "nvfp4")
    with pytest.raises(ValueError, match="STEP37_DENSE_WEIGHTS is 'nvfp4', expected bf16 or fp8"):
        dense_format()


class Projection(torch.nn.Linear):
    quant_method: object = None


def test_the_way_to_fp8_takes_nine_bytes_a_number_and_gives_one_back() -> None:
    """What `step37 command` counts on: fp32 twice and the codes, beside the BF16 weight."""
    layer = Projection(4096, 64, bias=False).bfloat16()
    live, numbers = LiveBytes(), layer.weight.numel()
    live.note(layer.weight)
    before = live.now
    operation = dispatch.choose("linear", dispatch.Target("cpu", None, "fp8"))
    with live:
        quantize_projection(layer, operation)
    assert live.peak - before == pytest.approx(9 * numbers, rel=0.01)
    assert live.now - before == pytest.approx(-numbers, rel=0.01)


def test_a_quantised_layer_takes_no_new_weights() -> None:
    layer = Projection(32, 16, bias=False)
    assert loadable(layer) is layer.weight
    operation = dispatch.choose("linear", dispatch.Target("cpu", None, "fp8"))
    x, exact = torch.randn(3, 32), through_fp8(layer.weight.data)
    quantize_projection(layer, operation)
    assert isinstance(layer.quant_method, FP8Projection)
    assert torch.allclose(layer.quant_method.apply(layer, x), x @ exact.T, atol=1e-6)
    with pytest.raises(ValueError, match="STEP37_DENSE_WEIGHTS.*start the server again"):
        loadable(layer)
