"""Every dialogue that the small model was taught, over HTTP, in all three formats."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle, islice

import pytest
from openai import OpenAI

from step37_ext.chat import ask, ask_streamed, with_tool_results
from step37_ext.checkpoint.dialogues import DIALOGUES, Dialogue
from step37_ext.demo import run_tool

BY_NAME = {dialogue.name: dialogue for dialogue in DIALOGUES}
STREAMED = ("hello", "arithmetic_high", "weather_lima", "weather_oslo_result", "picture_plan")


@pytest.mark.parametrize("dialogue", DIALOGUES, ids=lambda dialogue: dialogue.name)
def test_answer(client: OpenAI, dialogue: Dialogue) -> None:
    assert ask(client, dialogue).difference(dialogue) is None


@pytest.mark.parametrize("name", STREAMED)
def test_streamed_answer(client: OpenAI, name: str) -> None:
    dialogue, parts = BY_NAME[name], []
    answer = ask_streamed(client, dialogue, lambda part, text: parts.append(part))
    assert answer.difference(dialogue) is None
    # A word or so at a time, with drafts up to four tokens; all of the reasoning comes first.
    assert parts.count("reasoning") > 1
    assert parts == sorted(parts, reverse=True)


def test_tool_call_and_its_result(client: OpenAI) -> None:
    dialogue, after = BY_NAME["weather_lima"], BY_NAME["weather_lima_result"]
    messages = with_tool_results(dialogue, ask(client, dialogue), run_tool)
    assert ask(client, replace(after, messages=messages)).difference(after) is None


def test_32_requests_at_once(client: OpenAI) -> None:
    dialogues = list(islice(cycle(DIALOGUES), 32))
    with ThreadPoolExecutor(len(dialogues)) as pool:
        answers = list(pool.map(lambda dialogue: ask(client, dialogue), dialogues))
    differences = [a.difference(d) for a, d in zip(answers, dialogues, strict=True)]
    assert differences == [None] * 32
