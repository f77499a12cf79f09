"""What transformers' own Step3p7 says to the same tokens, and the comparison with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from harness import Answer, Mutation, Request, Stored, Worker
from safetensors import safe_open
from torch import Tensor
from transformers import DynamicCache

from step37_ext.checkpoint.oracle import transformers_model
from step37_ext.checkpoint.spec import TINY

LOGPROB_BOUND = 1e-3
"""float32 against float32: the two differ in the order of their sums. A sum of a few hundred
products has a relative error near 1e-6, five layers of them reach a logprob of size 10 as 1e-5 (as
was seen, at most); a wrong key, clamp or scale moves some of hundreds of logprobs by far more."""

MIDPOINT_TOLERANCE = 2**-16
"""How far from the midpoint of two e4m3 values, relative to the largest number of the tensor, the
last bits of float32 may decide: 1.5e-5, a hundred times what was seen. Steps of e4m3 are 2^-4 to
2^-3 of a number, so that of thousands of codes rounded by a wrong scale most are further away."""

Scales = dict[int, tuple[float, float]]
"""Per layer `k_scale` and `v_scale`."""


def check(model: Any, answer: Answer, cache: DynamicCache | None = None, **pictures: Any) -> None:
    """Greedy tokens equal, and every logprob within `LOGPROB_BOUND`.

    Args:
        cache: what transformers keeps keys and values in.
        pictures: transformers' inputs for the pictures of the prompt.

    Raises:
        AssertionError: it is not so.
    """
    tokens = torch.tensor([answer.prompt + answer.tokens])
    with torch.no_grad():
        logits = model(
            input_ids=tokens, past_key_values=cache, use_cache=cache is not None, **pictures
        ).logits
    logprobs = logits[0, :-1].log_softmax(-1)
    assert logprobs[len(answer.prompt) - 1 :].argmax(-1).tolist() == answer.tokens
    # SGLang puts a hash of the picture where transformers has the same id for all pictures.
    of_text = tokens[0, 1:] != model.config.image_token_id
    of_tokens = logprobs.gather(1, tokens[0, 1:, None])[:, 0]
    first = len(of_tokens) - len(answer.logprobs)
    difference = (torch.tensor(answer.logprobs) - of_tokens[first:])[of_text[first:]].abs()
    wrong = int((~(difference <= LOGPROB_BOUND)).sum())  # NaN is wrong too
    assert not wrong, (
        f"{wrong} of {len(difference)} logprobs differ by more than {LOGPROB_BOUND}, "
        f"number {int(difference.argmax())} by {difference.max():.1e}"
    )


def noise(length: int, seed: int = 0) -> list[int]:
    """Random token ids: where the model has learnt no answer, its logprobs tell the most."""
    draw = torch.Generator().manual_seed(seed)
    # The first ids are the special tokens, `<im_patch>` among them.
    return torch.randint(20, TINY.vocab_size, (length,), generator=draw).tolist()


class Subject:
    """One checkpoint served with some flags, and the same as transformers' model."""

    def __init__(self, worker: Worker, folder: Path, flags: str = "") -> None:
        self.folder = folder
        self.model: Any = transformers_model(folder)
        self._worker, self._flags = worker, flags

    def served(self) -> Worker:
        """The worker, with the checkpoint loaded."""
        self._worker.load(self.folder, self._flags)
        return self._worker

    def check_with_fp8_cache(self, request: Request, mutation: Mutation | None = None) -> None:
        """`check` the answer, and every code that went into the e4m3 cache.

        Raises:
            AssertionError: one of them is not right.
        """
        answer, stored = self.served().ask_and_read_cache(request, mutation)
        check(self.model, answer, E4M3Cache(self.model, cache_scales(self.folder), stored))


class E4M3Cache(DynamicCache):
    """Transformers' cache, but keys and values pass through e4m3 with the checkpoint's scales.

    A number halfway between two e4m3 values goes either way with the last bits of float32, and a
    step of e4m3 (up to 12%) is large enough to make later layers route a token elsewhere. So each
    layer rounds its own numbers, compares its codes with those in the cache under test, and where
    they differ demands that its number is at the midpoint of the two; then it goes on with the
    code under test, so that all else can be held to float32's accuracy.
    """

    def __init__(self, model: Any, scales: Scales, stored: Stored) -> None:
        super().__init__(config=model.config.text_config)
        self.scales, self.stored = scales, stored

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kw):
        keys, values = self.stored[layer_idx]
        k_scale, v_scale = self.scales[layer_idx]
        key_states = through_e4m3(key_states, k_scale, keys, f"keys of layer {layer_idx}")
        value_states = through_e4m3(value_states, v_scale, values, f"values of layer {layer_idx}")
        return super().update(key_states, value_states, layer_idx, *args, **kw)


def cache_scales(folder: Path) -> Scales:
    """Each layer's `k_scale` and `v_scale` as the checkpoint in `folder` stores them, else 1."""
    scales: dict[int, dict[str, float]] = {i: {"k": 1.0, "v": 1.0} for i in range(TINY.layers)}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if found := re.search(r"layers\.(\d+)\.self_attn\.._proj\.([kv])_scale$", name):
                    scales[int(found[1])][found[2]] = file.get_tensor(name).item()
    return {layer: (pair["k"], pair["v"]) for layer, pair in scales.items()}


def through_e4m3(states: Tensor, scale: float, stored: Tensor, what: str) -> Tensor:
    """`states` `[1, heads, T, D]` as e4m3 gives them back, with `stored` deciding midpoints.

    Args:
        stored: the other's codes as bytes, `[T - 1, heads, D]`: what follows the last token was
            not computed there, so its keys and values were never stored.

    Raises:
        AssertionError: a stored code is not the right rounding.
    """
    exact = np.clip(states[0].transpose(0, 1).numpy() / np.float32(scale), -448, 448)
    rounded = exact.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    theirs = stored.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ours = rounded[: len(theirs)]
    from_midpoint = np.abs(exact[: len(theirs)] - (ours + theirs) / 2)[ours != theirs]
    # Errors of these sums are relative to the largest terms in them, not to their result.
    tolerance = MIDPOINT_TOLERANCE * np.abs(exact).max()
    wrong = int((~(from_midpoint <= tolerance)).sum())  # NaN is wrong too
    assert not wrong, (
        f"{what}: {wrong} of {theirs.size} e4m3 codes are wrong, by up to "
        f"{from_midpoint.max():.1e} from the midpoint, where the largest number is 448"
    )
    rounded[: len(theirs)] = theirs
    return torch.from_numpy(rounded * np.float32(scale)).transpose(0, 1)[None]
