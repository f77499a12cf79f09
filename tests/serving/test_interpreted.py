"""The very Triton kernels, interpreted, inside a live server: the end of an answer per format.

An interpreted pass takes seconds, so that the server is given all but three tokens of the answer.
That tokens and logprobs equal the reference's is tested in one process (tests/model).
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import preloaded
import pytest
from rich.console import Console

from step37_ext.checkpoint.dialogues import DIALOGUES
from step37_ext.checkpoint.spec import TINY
from step37_ext.checkpoint.tokenizer import TURN_END, load_tokenizer, render_prompt
from step37_ext.checkpoint.weight_format import WeightFormat
from step37_ext.local_server import PLATFORM, LocalServer

INTERPRETED = PLATFORM | {"STEP37_IMPL": "interpret", "TRITON_INTERPRET": "1"}
KERNELS = {"route", "experts", "shared_expert", "prologue", "attend"}
HELLO = DIALOGUES[0]


@pytest.mark.parametrize(
    ("weight_format", "popen"),
    [("bf16", preloaded.Popen), ("fp8", preloaded.Popen), ("nvfp4", subprocess.Popen)],
    ids=["bf16", "fp8", "nvfp4"],
)
def test_the_kernels_answer(
    tiny: Callable[[WeightFormat], Path],
    monkeypatch: pytest.MonkeyPatch,
    weight_format: WeightFormat,
    popen: type,
) -> None:
    """In bfloat16; the NVFP4 checkpoint asks for an FP8 cache, with its scales.

    One of the servers imports everything with the interpreter on, as a user's does.
    """
    monkeypatch.setattr(subprocess, "Popen", popen)
    whole = render_prompt(load_tokenizer(TINY.vocab_size), HELLO) + HELLO.completion
    start, _, _ = whole.partition(" you?")
    request = {"text": start, "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
    with LocalServer(tiny(weight_format), environment=INTERPRETED) as server:
        server.wait_ready(Console())
        answer = httpx.post(f"{server.url}/generate", json=request, timeout=120, trust_env=False)
        rows = [line.split("\u2502") for line in server.operations().splitlines()]
    ran = {row[1].strip(): row[4].strip() for row in rows if len(row) == 7}
    assert {name for name, ran_by in ran.items() if ran_by == "interpret"} >= KERNELS, ran
    assert start + answer.raise_for_status().json()["text"] + TURN_END == whole
