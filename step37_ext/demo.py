"""The demo: SGLang serves the small model in each format, and every answer is checked."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI, OpenAIError
from rich.console import Console
from rich.text import Text

from step37_ext.chat import Answer, ask, ask_streamed, connect, with_tool_results
from step37_ext.checkpoint.dialogues import DIALOGUES, WEATHER, Dialogue
from step37_ext.checkpoint.make import make_tiny
from step37_ext.checkpoint.weight_format import WeightFormat
from step37_ext.local_server import PLATFORM, LocalServer, ServerDied
from step37_ext.token_check import GreedyTokens, server_tokens, transformers_tokens

_BY_NAME = {dialogue.name: dialogue for dialogue in DIALOGUES}

#: Title of a request and the dialogue that it asks; a name with `_result` follows a tool call.
_REQUESTS = (
    ("A chat", "hello"),
    ("One image", "picture_ticket"),
    ("Another image", "picture_sign"),
    ("A large image, with crops", "picture_plan"),
    ("Two images in one request", "compare_ticket_sign"),
    ("The same two, swapped", "compare_sign_ticket"),
    ("Reasoning effort low", "arithmetic_low"),
    ("Reasoning effort medium", "arithmetic_medium"),
    ("Reasoning effort high", "arithmetic_high"),
    ("A long prompt, the fact at its start", "long_3862"),
    ("The same with another fact", "long_7049"),
)
_TOKEN_CHECKS = ("long_3862", "picture_plan")
_UNKNOWN = Dialogue(
    "unknown",
    [{"role": "user", "content": "What do 3 chairs and a lamp cost in the library of Oslo?"}],
    reasoning="",
)


@dataclass(frozen=True)
class Serving:
    """One server of the demo.

    In float32, which is what lets tokens be compared with transformers, the reference computes. The
    kernels compute in bfloat16, and so slowly in the interpreter that they get one request.
    """

    title: str
    weight_format: WeightFormat
    arguments: tuple[str, ...] = ("--dtype", "float32")
    environment: dict[str, str] = field(default_factory=lambda: dict(PLATFORM))
    interpreted: bool = False

    @property
    def token_checks(self) -> tuple[Dialogue, ...]:
        """Prompts whose greedy tokens have to be those of transformers.

        Beside two of the dialogues one that the model does not know, where the best token leads by
        little. With an FP8 cache, whose rounding transformers has not, that lead may not suffice.
        """
        known = tuple(_BY_NAME[name] for name in _TOKEN_CHECKS)
        return known if "fp8_e4m3" in self.arguments else (*known, _UNKNOWN)


SERVINGS = (
    Serving("BF16 checkpoint", "bf16"),
    Serving("FP8 checkpoint, 128x128 blocks", "fp8"),
    Serving(
        "NVFP4 checkpoint, FP8 KV cache",
        "nvfp4",
        (
            *("--dtype", "float32", "--quantization", "modelopt_fp4"),
            *("--kv-cache-dtype", "fp8_e4m3"),
        ),
    ),
    Serving(
        "NVFP4 checkpoint, FP8 KV cache: the Triton kernels in the interpreter",
        "nvfp4",
        ("--quantization", "modelopt_fp4", "--kv-cache-dtype", "fp8_e4m3"),
        PLATFORM | {"STEP37_IMPL": "interpret", "TRITON_INTERPRET": "1"},
        interpreted=True,
    ),
)


class Demo:
    """Prints requests, answers and whether they are right, and keeps the count."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.passed = self.total = 0

    def run(self, servings: tuple[Serving, ...] = SERVINGS) -> bool:
        """Serve and check each of `servings`; returns whether everything was right."""
        with tempfile.TemporaryDirectory(prefix="step37-demo-") as folder:
            for serving in servings:
                checkpoint = Path(folder, serving.weight_format)
                if not checkpoint.exists():
                    make_tiny(checkpoint, serving.weight_format)
                self._serve(serving, checkpoint)
        self.console.print(f"\ndemo: {self.passed}/{self.total}", style="bold")
        return self.passed == self.total

    def _serve(self, serving: Serving, checkpoint: Path) -> None:
        self.console.rule(f"[bold]{serving.title}")
        server = LocalServer(checkpoint, *serving.arguments, environment=serving.environment)
        self._print("$", server.command, "dim")
        with server:
            try:
                expected: tuple[GreedyTokens, ...] = ()
                if not serving.interpreted:
                    self.console.print("SGLang starts; meanwhile transformers answers, to compare.")
                    expected = transformers_tokens(checkpoint, serving.token_checks)
                self.console.print(f"Ready after {server.wait_ready(self.console):.0f} s.")
                self.console.print(Text(server.operations()))
                with connect(server.url) as client:
                    if serving.interpreted:
                        self._slowly(client, _BY_NAME["hello"])
                    else:
                        self.ask_everything(client)
                if expected:
                    self.check_tokens(server.url, expected)
            except ServerDied as error:
                self.check("the server", str(error))
            except httpx.HTTPError as error:
                self.check("the server", f"{error!r}; its last lines:\n{server.log_tail()}")
        self.console.print("Server stopped.")

    def ask_everything(self, client: OpenAI) -> None:
        """All requests but the token comparison, through the `openai` client."""
        for title, name in _REQUESTS:
            dialogue = _BY_NAME[name]
            self._request(title, dialogue)
            self._ask(partial(ask, client, dialogue), dialogue)
        self._streamed(client, _BY_NAME["arithmetic"])
        for city in WEATHER:
            self._tool_call(client, _BY_NAME[f"weather_{city.lower()}"])

    def _slowly(self, client: OpenAI, dialogue: Dialogue) -> None:
        self._request("A chat, half a minute in the interpreter", dialogue)
        self._ask(partial(ask, client, dialogue), dialogue)

    def _streamed(self, client: OpenAI, dialogue: Dialogue) -> None:
        self._request("A streamed answer, reasoning apart from content", dialogue)
        pieces: list[tuple[str, str]] = []

        def show(part: str, text: str) -> None:
            if not pieces or pieces[-1][0] != part:
                self.console.print(Text(f"\n  {part} in pieces: ", "dim"), end="")
            pieces.append((part, text))
            self.console.print(Text(text.replace("\n", "\N{RETURN SYMBOL}") + "|"), end="")

        def send() -> Answer:
            answer = ask_streamed(client, dialogue, show)
            self.console.print()
            return answer

        answer = self._ask(send, dialogue)
        if answer is not None:
            parts = [part for part, _ in pieces]
            in_order = parts == sorted(parts, reverse=True) and len(set(parts)) == 2
            problem = None if in_order else f"the pieces were {parts}"
            self.check(f"{len(parts)} pieces, reasoning before content", problem)

    def _tool_call(self, client: OpenAI, dialogue: Dialogue) -> None:
        self._request("A tool call", dialogue)
        answer = self._ask(partial(ask, client, dialogue), dialogue)
        if answer is None:
            return
        expected = _BY_NAME[f"{dialogue.name}_result"]
        follow_up = replace(expected, messages=with_tool_results(dialogue, answer, run_tool))
        self._request("Its result sent back", follow_up)
        self._ask(partial(ask, client, follow_up), follow_up)

    def check_tokens(self, url: str, cases: tuple[GreedyTokens, ...]) -> None:
        """Compare the server's greedy tokens with those of transformers, one check a prompt."""
        self.console.print("\n[bold]Greedy tokens, beside transformers' own Step3p7 in float32")
        for case in cases:
            got = server_tokens(url, case)
            problem = None if got == case.tokens else f"{got}, transformers has {case.tokens}"
            self.check(f"{case.dialogue.name}: {len(got)} tokens equal", problem)

    def check(self, what: str, problem: str | None) -> bool:
        """Count one check, print it, and return whether it passed."""
        self.total += 1
        self.passed += problem is None
        mark, style = ("ok", "green") if problem is None else ("WRONG", "bold red")
        self._print(f"  [{mark}]", what if problem is None else f"{what}: {problem}", style)
        return problem is None

    def _request(self, title: str, dialogue: Dialogue) -> None:
        self.console.print(f"\n[bold]{title}")
        for message in dialogue.messages:
            self._print(f"  {message['role']}:", _shown(message), "cyan")
        for key, value in dialogue.request.items():
            names = [tool["function"]["name"] for tool in value] if key == "tools" else value
            self._print(f"  {key}:", str(names), "cyan")

    def _ask(self, send: Callable[[], Answer], dialogue: Dialogue) -> Answer | None:
        """Print and check the answer; None if it is wrong, or an error came instead."""
        try:
            answer = send()
        except OpenAIError as error:
            self.check("an answer", repr(error))
            return None
        self._print("  reasoning:", answer.reasoning.strip(), "italic")
        if answer.content.strip():
            self._print("  content:", answer.content.strip(), "bold")
        for call in answer.tool_calls:
            self._print("  call:", f"{call.name}({call.arguments})", "bold")
        return answer if self.check("as expected", answer.difference(dialogue)) else None

    def _print(self, label: str, text: str, style: str = "") -> None:
        """One line; as Text, because an answer may hold what rich takes for markup."""
        self.console.print(Text.assemble((label, "dim"), " ", (text, style)))


def run_tool(name: str, arguments: dict[str, Any]) -> object:
    """The one function that the demo offers to the model: a made-up weather service."""
    if name != "get_weather":
        raise ValueError(f"function {name!r}: the only one offered is 'get_weather'")
    return WEATHER[arguments["city"]]


def _shown(message: dict[str, Any]) -> str:
    """The text of a message, pictures and tool calls in brackets, cut to a few lines."""
    content = message["content"] or ""
    if not isinstance(content, str):
        content = " ".join(
            part["text"] if part["type"] == "text" else "[picture]" for part in content
        )
    for call in message.get("tool_calls", ()):
        function = call["function"]
        content = f"{content.strip()} [call {function['name']}({function['arguments']})]".strip()
    return content if len(content) <= 240 else f"{content[:150]} [...] {content[-80:]}"


def run_demo() -> bool:
    """Run the whole demo on the terminal; returns whether everything was right.

    A termination signal, and the end of the terminal, end it as Ctrl-C does: server stopped.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    return Demo(Console()).run()
