"""The requests of the demo, and how it counts them."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from openai import OpenAI
from rich.console import Console

from step37_ext import demo

pytestmark = pytest.mark.parametrize("server", ["bf16"], indirect=True)


def test_right_answers_count_and_a_wrong_one_shows(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    hello = replace(demo._BY_NAME["hello"], content="Hello! What can you do for me?")
    monkeypatch.setitem(demo._BY_NAME, "hello", hello)
    output = io.StringIO()
    run = demo.Demo(Console(file=output, width=200))
    run.ask_everything(client)
    assert (run.passed, run.total) == (16, 17), output.getvalue()
    assert output.getvalue().count("[WRONG]") == 1
