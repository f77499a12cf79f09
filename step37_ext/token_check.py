"""Greedy tokens of a served checkpoint beside those of transformers' own Step3p7."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoProcessor

from step37_ext.checkpoint.dialogues import Dialogue
from step37_ext.checkpoint.oracle import transformers_model
from step37_ext.checkpoint.tokenizer import render_prompt

NEW_TOKENS = 24


@dataclass(frozen=True)
class GreedyTokens:
    """What transformers answers, greedy and in float32, to the request of `dialogue`.

    Attributes:
        prompt: the rendered prompt, one `<im_patch>` per picture.
        tokens: at most `NEW_TOKENS` token ids, with the one that ends the turn.
    """

    dialogue: Dialogue
    prompt: str
    tokens: list[int]


@torch.no_grad()
def transformers_tokens(
    checkpoint: Path, dialogues: tuple[Dialogue, ...]
) -> tuple[GreedyTokens, ...]:
    """Run transformers' model, its weights dequantised apart from our code, on `dialogues`."""
    model: Any = transformers_model(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    cases = []
    for dialogue in dialogues:
        prompt = render_prompt(processor.tokenizer, dialogue)
        inputs = processor(text=prompt, images=dialogue.images() or None, return_tensors="pt")
        output = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=model.config.text_config.eos_token_id,
        )
        tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
        cases.append(GreedyTokens(dialogue, prompt, tokens))
    return tuple(cases)


def server_tokens(url: str, case: GreedyTokens) -> list[int]:
    """The token ids that the server at `url` gives for the same prompt.

    From SGLang's own `/generate`, because OpenAI's schema has no token ids.

    Raises:
        httpx.HTTPError: the server is not there, or refuses.
    """
    pictures = [
        part["image_url"]["url"]
        for message in case.dialogue.messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image_url"
    ]
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS}
    with httpx.Client(trust_env=False, timeout=120.0) as client:
        response = client.post(
            f"{url}/generate",
            json={"text": case.prompt, "image_data": pictures, "sampling_params": sampling},
        )
    response.raise_for_status()
    tokens: list[int] = response.json()["output_ids"]
    return tokens
