"""Requests that are wrong or odd: a clear answer, and the server goes on serving."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from PIL import Image

from step37_ext.chat import ask
from step37_ext.checkpoint.dialogues import DIALOGUES, picture_url
from step37_ext.checkpoint.weight_format import WeightFormat
from step37_ext.local_server import LocalServer

HELLO = DIALOGUES[0]

pytestmark = pytest.mark.parametrize("server", ["bf16"], indirect=True)


@pytest.fixture
def http(server: LocalServer, client: OpenAI) -> Iterator[httpx.Client]:
    """Plain HTTP, so that a request can be as wrong as it likes; then the server must answer."""
    with httpx.Client(base_url=server.url, trust_env=False, timeout=180.0) as http:
        yield http
    assert ask(client, HELLO).difference(HELLO) is None


def chat(messages: list[dict[str, Any]], **fields: object) -> dict[str, Any]:
    return {
        "model": "default",
        "messages": messages,
        "temperature": 0,
        "max_tokens": 4,
        **fields,
    }


def about_pictures(*urls: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return chat([{"role": "user", "content": [*parts, {"type": "text", "text": "Describe"}]}])


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "#456").save(buffer, "PNG")
    return data_url(buffer.getvalue(), "image/png")


def data_url(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def cut_short(url: str) -> str:
    data = base64.b64decode(url.partition(",")[2])
    return data_url(data[: len(data) // 2], "image/png")


def tool(parameters: object) -> dict[str, Any]:
    function = {"name": "get_weather", "parameters": parameters}
    return {"tools": [{"type": "function", "function": function}]}


USER = [{"role": "user", "content": "Hello!"}]
REFUSED = {
    "corrupt image": (about_pictures(cut_short(picture_url("sign"))), "decode image"),
    "not an image": (about_pictures(data_url(b"a text", "text/plain")), "decode image"),
    "not base64": (about_pictures("data:image/png;base64,@@@"), "base64"),
    "prompt too long": (
        chat([{"role": "user", "content": "Hello! " * 5000}]),
        "longer than the model's context length (4096 tokens)",
    ),
    "answer too long": (chat(USER, max_tokens=5000), "maximum context length of 4096 tokens"),
    "no messages": (chat([]), "Messages cannot be empty"),
    "no such type": (chat(USER, **tool({"type": "banana"})), "invalid 'parameters' schema"),
    "no schema at all": (chat(USER, **tool("banana")), "invalid 'parameters' schema"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(http: httpx.Client, name: str) -> None:
    request, reason = REFUSED[name]
    response = http.post("/v1/chat/completions", json=request)
    assert response.status_code == 400
    assert reason in response.json()["message"]


def test_new_weights_are_refused_and_the_old_ones_serve(
    http: httpx.Client, tiny: Callable[[WeightFormat], Path]
) -> None:
    response = http.post("/update_weights_from_disk", json={"model_path": str(tiny("bf16"))})
    assert response.status_code == 400
    assert "--model-impl step37 cannot take new weights" in response.json()["message"]


# A view of the whole picture is 169 tokens and its two marks; a crop is 81 and two, and a mark
# stands after each row of crops but the last. What stays is the text of the prompt.
VIEW, CROP = 169 + 2, 81 + 2
SIZES = {
    "1x1": ([(1, 1)], VIEW),
    "two rows of three crops": ([(1200, 800)], VIEW + 6 * CROP + 1),
    "with and without crops": ([(900, 900), (64, 64)], 2 * VIEW + 4 * CROP + 1),
    # Padded to a square, then shrunk to 3024 pixels: six rows of six crops.
    "20000x10": ([(20000, 10)], VIEW + 36 * CROP + 5),
}


@pytest.mark.parametrize("name", SIZES)
def test_odd_pictures_are_served(http: httpx.Client, name: str) -> None:
    sizes, picture_tokens = SIZES[name]
    text_only = http.post("/v1/chat/completions", json=about_pictures())
    response = http.post("/v1/chat/completions", json=about_pictures(*(png(*s) for s in sizes)))
    assert response.status_code == 200, response.text
    used = response.json()["usage"]["prompt_tokens"] - text_only.json()["usage"]["prompt_tokens"]
    assert used == picture_tokens


def test_client_hangs_up_in_the_middle_of_a_stream(http: httpx.Client) -> None:
    request = chat(USER, stream=True, ignore_eos=True, max_tokens=3900)
    with http.stream("POST", "/v1/chat/completions", json=request) as response:
        assert response.status_code == 200
        lines = response.iter_lines()  # kept: without a reference the stream would be closed
        next(lines)
        assert running_requests(http) == 1
    # All 3900 tokens would take most of a minute.
    deadline = time.monotonic() + 5
    while running_requests(http) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running_requests(http) == 0


def running_requests(http: httpx.Client) -> int:
    load = http.get("/v1/loads").json()["loads"][0]
    running: int = load["num_running_reqs"] + load["num_waiting_reqs"]
    return running
