"""One chat request to an OpenAI-compatible server, and its answer beside the expected one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import httpx
from openai import OpenAI

from step37_ext.checkpoint.dialogues import Dialogue, Message


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called; `arguments` is JSON."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()

    def difference(self, dialogue: Dialogue) -> str | None:
        """What differs from the answer that `dialogue` expects, or None.

        Everything must be equal to the letter, but for white space at the ends: the newlines
        around `</think>` and before a tool call belong to the format and not to the text.
        """
        calls = [(call.name, _parsed(call.arguments)) for call in self.tool_calls]
        expected_calls = [] if dialogue.tool_call is None else [dialogue.tool_call]
        for part, got, expected in (
            ("reasoning", self.reasoning.strip(), dialogue.reasoning),
            ("content", self.content.strip(), dialogue.content),
            ("tool calls", calls, expected_calls),
        ):
            if got != expected:
                return f"{part}: got {got!r}, expected {expected!r}"
        return None


def connect(url: str) -> OpenAI:
    """A client of the server at `url`, which no proxy of the environment comes between."""
    return OpenAI(
        base_url=f"{url}/v1",
        api_key="EMPTY",
        max_retries=0,
        http_client=httpx.Client(trust_env=False, timeout=120.0),
    )


def ask(client: OpenAI, dialogue: Dialogue) -> Answer:
    """Send the request of `dialogue` and wait for the whole answer, greedy."""
    message = client.chat.completions.create(**_request(dialogue)).choices[0].message
    calls = tuple(
        ToolCall(call.id, call.function.name, call.function.arguments)
        for call in message.tool_calls or ()
    )
    return Answer(_reasoning(message), message.content or "", calls)


def ask_streamed(
    client: OpenAI, dialogue: Dialogue, show: Callable[[str, str], None] | None = None
) -> Answer:
    """As `ask`, streamed; `show` gets every piece as it comes, "reasoning" or "content" first."""
    reasoning, content = "", ""
    calls: list[ToolCall] = []
    for chunk in client.chat.completions.create(stream=True, **_request(dialogue)):
        if not chunk.choices:
            continue
        delta = chunk.choices[0].delta
        for part, text in (("reasoning", _reasoning(delta)), ("content", delta.content or "")):
            if text and show:
                show(part, text)
        reasoning += _reasoning(delta)
        content += delta.content or ""
        for piece in delta.tool_calls or ():
            if piece.index == len(calls):
                calls.append(ToolCall(piece.id or "", "", ""))
            call = calls[piece.index]
            calls[piece.index] = replace(
                call,
                name=call.name + (piece.function.name or ""),
                arguments=call.arguments + (piece.function.arguments or ""),
            )
    return Answer(reasoning, content, tuple(calls))


def with_tool_results(
    dialogue: Dialogue, answer: Answer, run: Callable[[str, dict[str, Any]], object]
) -> list[Message]:
    """The messages of the next request: those before, the calls in `answer`, their results.

    `run` gets the name and the arguments of a function and returns its result, which is sent back
    as JSON.
    """
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in answer.tool_calls
    ]
    results = [
        {
            "role": "tool",
            "tool_call_id": call.id,
            "content": json.dumps(run(call.name, json.loads(call.arguments))),
        }
        for call in answer.tool_calls
    ]
    assistant = {
        "role": "assistant",
        "content": answer.content,
        "reasoning_content": answer.reasoning,
        "tool_calls": calls,
    }
    return [*dialogue.messages, assistant, *results]


def _request(dialogue: Dialogue) -> dict[str, Any]:
    return {
        "model": "default",  # SGLang's name for the one model that it serves
        "messages": dialogue.messages,
        "temperature": 0,
        "max_tokens": 128,
        **dialogue.request,
    }


def _reasoning(message: Any) -> str:
    """`reasoning_content`, which is not part of OpenAI's own schema."""
    return getattr(message, "reasoning_content", None) or ""


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except json.JSONDecodeError:
        return arguments
