"""Many requests at once: right answers, none lost, and no growth of memory.

Set STEP37_SOAK_SECONDS for more than one round of requests; `make soak` does.
"""

from __future__ import annotations

import base64
import io
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI
from PIL import Image

from step37_ext.chat import ask
from step37_ext.checkpoint.dialogues import DIALOGUES, Dialogue
from step37_ext.local_server import LocalServer

pytestmark = pytest.mark.parametrize("server", ["bf16"], indirect=True)

SOAK_SECONDS = float(os.environ.get("STEP37_SOAK_SECONDS", "0"))
WITH_PICTURES = [dialogue for dialogue in DIALOGUES if dialogue.images()]
REQUESTS = list(islice(cycle([*WITH_PICTURES, *DIALOGUES]), 64))

MAX_GROWTH, MAX_GROWTH_A_ROUND = 64 * 2**20, 4 * 2**20
"""Seen were 25 MiB in the first round and ever less, 60 MiB in eight: SGLang keeps up to 100 MB of
pictures' features. The pixels of a round's new pictures, were they kept, are 60 MB in float32."""


def unseen(dialogue: Dialogue, number: int) -> Dialogue:
    """The dialogue with one pixel of its pictures changed, so that no cache knows them."""

    def part(value: dict[str, Any], image: Image.Image) -> dict[str, Any]:
        image = image.convert("RGB")
        image.putpixel((0, 0), (number % 256, number // 256, 0))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return value | {"image_url": {"url": url}}

    images = iter(dialogue.images())
    (message,) = dialogue.messages
    content = [
        part(value, next(images)) if value["type"] == "image_url" else value
        for value in message["content"]
    ]
    return replace(dialogue, messages=[message | {"content": content}])


def ask_all(client: OpenAI, number: int) -> list[str | None]:
    """Ask all at once, the first with new pictures; what is wrong with each answer."""
    new = [unseen(dialogue, number) for dialogue in WITH_PICTURES]
    requests = [*new, *REQUESTS[len(new) :]]
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = pool.map(lambda dialogue: ask(client, dialogue), requests)
        return [a.difference(d) for a, d in zip(answers, requests, strict=True)]


def resident_bytes(server: LocalServer) -> int:
    """Resident memory of the server and its workers."""
    parent = psutil.Process(server.pid)
    return sum(p.memory_info().rss for p in (parent, *parent.children(recursive=True)))


@pytest.mark.timeout(SOAK_SECONDS + 600)
def test_64_requests_at_once_and_memory(server: LocalServer, client: OpenAI) -> None:
    assert ask_all(client, 0) == [None] * 64
    before, deadline = resident_bytes(server), time.monotonic() + SOAK_SECONDS
    after: list[int] = []
    while not after or time.monotonic() < deadline:
        assert ask_all(client, len(after) + 1) == [None] * 64
        after.append(resident_bytes(server))
        print(f"round {len(after)}: {(after[-1] - before) / 2**20:+.0f} MiB")
    # The last few, as one may be taken before what is free has been given back.
    growth, allowed = min(after[-3:]) - before, MAX_GROWTH + len(after) * MAX_GROWTH_A_ROUND
    assert growth < allowed, f"{growth} bytes after {len(after)} rounds"


def test_requests_wait_while_the_cache_is_full(server: LocalServer, client: OpenAI) -> None:
    """12 prompts of 1000 tokens, of which the cache holds 8: the others wait, none is lost."""
    draw = random.Random(0)
    prompts = [[draw.randrange(20, 640) for _ in range(1000)] for _ in range(12)]

    with httpx.Client(base_url=server.url, trust_env=False, timeout=180.0) as http:
        assert http.get("/v1/loads").json()["loads"][0]["max_total_num_tokens"] < 9000

        def generate(prompt: list[int]) -> httpx.Response:
            parameters = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
            return http.post("/generate", json={"input_ids": prompt, "sampling_params": parameters})

        waiting = 0
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = [pool.submit(generate, prompt) for prompt in prompts]
            while not all(answer.done() for answer in answers):
                waiting = max(waiting, http.get("/v1/loads").json()["loads"][0]["num_waiting_reqs"])
                time.sleep(0.05)
    assert waiting > 0
    assert [answer.result().status_code for answer in answers] == [200] * 12
    assert [len(answer.result().json()["output_ids"]) for answer in answers] == [8] * 12
    hello = DIALOGUES[0]
    assert ask(client, hello).difference(hello) is None
