"""The served model against transformers' own Step3p7, per weight format, in float32.

Transformers holds the checkpoint's weights as `step37_ext.checkpoint.dequantised` reads them, which
shares no code with what is served. Activations are not quantised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from expected import Subject, check, noise
from harness import CHUNK, Request, Worker
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoProcessor

from step37_ext.checkpoint.dialogues import DIALOGUES
from step37_ext.checkpoint.make import random_checkpoint
from step37_ext.checkpoint.spec import GROUPS_8_12, TINY
from step37_ext.checkpoint.tokenizer import load_tokenizer, render_prompt
from step37_ext.checkpoint.weight_format import WeightFormat

TOKENIZER = load_tokenizer(TINY.vocab_size)
BY_NAME = {dialogue.name: dialogue for dialogue in DIALOGUES}


@pytest.fixture(scope="module", params=["bf16", "fp8", "nvfp4"])
def subject(
    request: pytest.FixtureRequest,
    worker: Worker,
    tiny_with_plain_cache: Callable[[WeightFormat], Path],
) -> Subject:
    return Subject(worker, tiny_with_plain_cache(request.param))


@pytest.fixture(scope="module")
def groups_of_8_and_12(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("groups") / "bf16"
    random_checkpoint(folder, "bf16", GROUPS_8_12)
    return Subject(worker, folder)


def test_text(subject: Subject) -> None:
    prompts = [
        TOKENIZER(render_prompt(TOKENIZER, BY_NAME[name]), add_special_tokens=False).input_ids
        for name in ("hello", "arithmetic_high", "weather_oslo_result", "long_3862")
    ]
    for answer in subject.served().ask(*(Request(prompt, new_tokens=16) for prompt in prompts)):
        check(subject.model, answer)


def test_batch_of_unequal_lengths(subject: Subject) -> None:
    """Shorter than a window, at it and longer, and together more than one chunk."""
    prompts = [noise(20, 1), noise(TINY.sliding_window, 2), noise(150, 3)]
    for answer in subject.served().ask(*map(Request, prompts)):
        check(subject.model, answer)


def test_many_windows_in_chunks(subject: Subject) -> None:
    prompt = noise(10 * TINY.sliding_window)
    (answer,) = subject.served().ask(Request(prompt, new_tokens=4))
    assert answer.forward_passes == -(-len(prompt) // CHUNK) + 3, "not prefilled in chunks"
    check(subject.model, answer)


def test_prefix_from_the_radix_cache(subject: Subject) -> None:
    first = noise(4 * TINY.sliding_window)
    second = first[: 3 * TINY.sliding_window + 5] + noise(100, 9)
    _, answer = subject.served().ask_in_turn(Request(first), Request(second, prompt_logprobs=False))
    assert answer.cached > 0, "nothing of the prefix was found in the cache"
    check(subject.model, answer)


@pytest.mark.parametrize("name", ["picture_plan", "compare_ticket_sign"])
def test_pictures(subject: Subject, name: str) -> None:
    """One picture with crops, and two without, through SGLang's processor and encoder."""
    dialogue = BY_NAME[name]
    prompt = render_prompt(TOKENIZER, dialogue)
    urls = tuple(
        part["image_url"]["url"]
        for part in dialogue.messages[0]["content"]
        if part["type"] == "image_url"
    )
    inputs = AutoProcessor.from_pretrained(subject.folder)(
        text=prompt, images=dialogue.images(), return_tensors="pt"
    )
    (answer,) = subject.served().ask(Request(prompt, pictures=urls))
    assert answer.prompt == inputs["input_ids"][0].tolist()
    names = ["pixel_values", "pixel_values_local"][: len(answer.pixels)]
    for pixels, name in zip(answer.pixels, names, strict=True):
        # Transformers rounds to 8 bits after each of at most two resizes, by half a level each;
        # SGLang only after the first. The smallest deviation divided by is 0.26 of 255 levels.
        assert (pixels - inputs[name]).abs().max() < 1 / (255 * 0.26)
    pictures = dict(zip(names, answer.pixels, strict=True))
    check(subject.model, answer, num_local_patches=inputs["num_local_patches"], **pictures)


def test_groups_of_8_and_12_heads(groups_of_8_and_12: Subject) -> None:
    (answer,) = groups_of_8_and_12.served().ask(Request(noise(300)))
    check(groups_of_8_and_12.model, answer)


def test_fp8_cache_with_the_checkpoints_scales(nvfp4_with_fp8_cache: Subject) -> None:
    """Every stored code the right one, and all else as exact as with a float32 cache."""
    nvfp4_with_fp8_cache.check_with_fp8_cache(Request(noise(5 * TINY.sliding_window)))


@pytest.mark.parametrize(
    "weight_format, stored", [("fp8", torch.float32), ("bf16", torch.bfloat16)]
)
def test_router_gate_keeps_its_stored_type(
    worker: Worker,
    tiny: Callable[[WeightFormat], Path],
    weight_format: WeightFormat,
    stored: torch.dtype,
) -> None:
    """Whatever the model's type, here the other one."""
    other = "bfloat16" if stored == torch.float32 else "float32"
    worker.load(tiny(weight_format), f"--dtype {other}")
    types = worker.stored_types()
    gates = [dtype for name, dtype in types.items() if name.endswith(".moe.gate")]
    assert gates == [stored] * len(TINY.moe_layers)
    assert types["lm_head.weight"] == getattr(torch, other)


@pytest.mark.parametrize("weight_format", ["bf16", "fp8"])
def test_fp8_cache_without_scales(
    worker: Worker, tiny: Callable[[WeightFormat], Path], weight_format: WeightFormat
) -> None:
    """A checkpoint that stores no cache scales is cached with scales of 1."""
    subject = Subject(worker, tiny(weight_format), "--kv-cache-dtype fp8_e4m3")
    subject.check_with_fp8_cache(Request(noise(3 * TINY.sliding_window)))


def test_clamps_bite(nvfp4_with_fp8_cache: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """On such prompts every clamped layer has gates and up projections beyond its limits."""
    model = nvfp4_with_fp8_cache.model
    beyond: Counter[str] = Counter()

    def note(where: str, gate: Tensor, up: Tensor, limit: float) -> None:
        beyond[f"{where} gate"] += int((silu(gate) > limit).sum())
        beyond[f"{where} up"] += int((up.abs() > limit).sum())

    clamped = range(TINY.layers - TINY.clamped_layers, TINY.layers)
    for layer in clamped:
        block = model.model.language_model.layers[layer].mlp
        experts, shared = block.experts, block.shared_experts

        def routed(gate_up, experts=experts, layer=layer, apply=experts._apply_gate):
            note(f"routed {layer}", *gate_up.chunk(2, -1), experts.limit)
            return apply(gate_up)

        def in_shared(x, mlp=shared, layer=layer, forward=shared.forward):
            note(f"shared {layer}", mlp.gate_proj(x), mlp.up_proj(x), mlp.limit)
            return forward(x)

        monkeypatch.setattr(experts, "_apply_gate", routed)
        monkeypatch.setattr(shared, "forward", in_shared)
    with torch.no_grad():
        model(input_ids=torch.tensor([noise(150)]))
    assert len(beyond) == 4 * len(clamped)
    assert min(beyond.values()) > 0, beyond
