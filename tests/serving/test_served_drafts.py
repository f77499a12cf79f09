"""The server with drafts by the model's MTP layers says how many of them were accepted."""

from __future__ import annotations

import httpx
import pytest

from step37_ext.checkpoint.dialogues import DIALOGUES
from step37_ext.checkpoint.spec import TINY
from step37_ext.checkpoint.tokenizer import load_tokenizer, render_prompt
from step37_ext.local_server import LocalServer

TOKENIZER = load_tokenizer(TINY.vocab_size)


@pytest.mark.parametrize("server", ["fp8"], indirect=True)
def test_two_tokens_a_pass_at_least(server: LocalServer) -> None:
    """What is learnt by heart is also proposed; sampled tokens need not be."""
    (dialogue,) = (d for d in DIALOGUES if d.name == "arithmetic_high")
    prompt = TOKENIZER(render_prompt(TOKENIZER, dialogue), add_special_tokens=False).input_ids
    answer = TOKENIZER(dialogue.completion, add_special_tokens=False).input_ids
    greedy = {"temperature": 0, "max_new_tokens": len(answer)}
    sampled = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "max_new_tokens": 12}
    for parameters in (greedy, sampled):
        reply = httpx.post(
            f"{server.url}/generate",
            json={"input_ids": prompt, "sampling_params": parameters | {"ignore_eos": True}},
            timeout=60,
        ).json()
        info = reply["meta_info"]
        assert info["completion_tokens"] == parameters["max_new_tokens"]
        assert info["spec_verify_ct"] > 0
        if parameters is greedy:
            assert reply["output_ids"] == answer
            assert info["spec_accept_length"] >= 2
