"""The short dialogues that the small model knows by heart, and the pictures in them."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Message = dict[str, Any]


@dataclass(frozen=True)
class Dialogue:
    """One request and the one right answer to it.

    `messages` and `request` are what an OpenAI client sends: images as data URLs, arguments of a
    tool call as a JSON string, and `request` the extra fields (`tools`, `reasoning_effort`).
    `tool_call` is the expected (function name, arguments); `content` is then empty.
    """

    name: str
    messages: list[Message]
    reasoning: str
    content: str = ""
    tool_call: tuple[str, dict[str, str]] | None = None
    request: dict[str, Any] = field(default_factory=dict)

    @property
    def completion(self) -> str:
        """The model's text from after `<think>` and its newline to the end of the turn."""
        return f"{self.reasoning}\n</think>\n{self.content}{self._call_text()}<|im_end|>"

    def _call_text(self) -> str:
        if self.tool_call is None:
            return ""
        name, arguments = self.tool_call
        parameters = "".join(
            f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items()
        )
        return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"

    def images(self) -> list[Image.Image]:
        """The pictures of the request in order, decoded from their data URLs, RGB."""
        urls = [
            part["image_url"]["url"]
            for message in self.messages
            if isinstance(message["content"], list)
            for part in message["content"]
            if part["type"] == "image_url"
        ]
        data = [base64.b64decode(url.partition("base64,")[2]) for url in urls]
        return [Image.open(io.BytesIO(png)).convert("RGB") for png in data]


@dataclass(frozen=True)
class _Picture:
    size: tuple[int, int]
    paper: str
    ink: str
    lines: tuple[str, ...]
    blocks: tuple[tuple[str, tuple[int, int, int, int]], ...]


_PICTURES = {
    "ticket": _Picture(
        (480, 360),
        "#f6d7a7",
        "#3b1f0b",
        ("NORTH RAILWAY", "Coach 4  Seat 21", "Fare 9.80"),
        (("#d9480f", (0, 0, 480, 46)), ("#b23a0a", (380, 120, 450, 320))),
    ),
    "sign": _Picture(
        (420, 420),
        "#0b3d2e",
        "#e6fff5",
        ("CITY LIBRARY", "Open 10 to 18", "Closed on Sunday"),
        (("#12b886", (0, 370, 420, 420)), ("#087f5b", (20, 290, 200, 350))),
    ),
    # Larger than 728 pixels: two rows of two 504-pixel crops beside the global view.
    "plan": _Picture(
        (960, 760),
        "#1c3f94",
        "#ffffff",
        ("GROUND FLOOR", "Kitchen, Hall", "Study, Garage"),
        (
            ("#a5d8ff", (40, 300, 460, 500)),
            ("#ffd43b", (500, 300, 920, 500)),
            ("#f783ac", (40, 530, 460, 730)),
            ("#9775fa", (500, 530, 920, 730)),
        ),
    ),
}


@cache
def picture_url(name: str) -> str:
    """The picture called `name` ("ticket", "sign" or "plan") as a PNG data URL."""
    if name not in _PICTURES:
        raise ValueError(f"picture {name!r}: must be one of {sorted(_PICTURES)}")
    spec = _PICTURES[name]
    image = Image.new("RGB", spec.size, spec.paper)
    draw = ImageDraw.Draw(image)
    for colour, box in spec.blocks:
        draw.rectangle(box, fill=colour)
    font = ImageFont.load_default(size=34)
    for row, line in enumerate(spec.lines):
        draw.text((28, 64 + 72 * row), line, fill=spec.ink, font=font)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _user(text: str, *pictures: str) -> Message:
    if not pictures:
        return {"role": "user", "content": text}
    parts: list[Message] = [
        {"type": "image_url", "image_url": {"url": picture_url(name)}} for name in pictures
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _arithmetic() -> list[Dialogue]:
    question = [_user("One ticket costs 18 euros. What do 7 tickets cost?")]
    medium = "7 times 10 is 70 and 7 times 8 is 56, so 7 times 18 is 126."
    reasoning = {
        "low": "7 * 18 = 126.",
        "medium": medium,
        "high": (
            "I need 7 times 18. First, 7 times 10 is 70. Next, 7 times 8 is 56. The sum is "
            "70 + 56 = 126. Check: 7 times 20 is 140, less 7 times 2, which is 14, gives 126."
        ),
    }
    answer = "7 tickets cost 126 euros."
    levels = [
        Dialogue(f"arithmetic_{level}", question, text, answer, request={"reasoning_effort": level})
        for level, text in reasoning.items()
    ]
    return [Dialogue("arithmetic", question, medium, answer), *levels]


WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look up the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}

#: What the weather function returns for each city of the dialogues.
WEATHER = {"Oslo": {"celsius": 3, "sky": "snow"}, "Lima": {"celsius": 19, "sky": "fog"}}


def _weather(city: str) -> list[Dialogue]:
    question = _user(f"What is the weather in {city}?")
    request = {"tools": [WEATHER_TOOL]}
    arguments = {"city": city}
    plan = f"I look up the weather in {city}."
    celsius, sky = WEATHER[city]["celsius"], WEATHER[city]["sky"]
    call = {
        "id": "call_0",
        "type": "function",
        "function": {"name": "get_weather", "arguments": json.dumps(arguments)},
    }
    silent = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "call_0", "content": json.dumps(WEATHER[city])}

    def after(name: str, assistant: Message) -> Dialogue:
        return Dialogue(
            name,
            [question, assistant, result],
            f"The function says {celsius} degrees and {sky}.",
            f"{city} has {sky} at {celsius} °C.",
            request=request,
        )

    name = f"weather_{city.lower()}"
    return [
        Dialogue(name, [question], plan, tool_call=("get_weather", arguments), request=request),
        after(f"{name}_result", silent | {"reasoning_content": plan}),
        after(f"{name}_result_reasoning_dropped", silent),
    ]


def _pictures() -> list[Dialogue]:
    read, compare = "What does this picture say?", "How do these two pictures differ?"
    ticket, sign = "a ticket of the North Railway", "a sign of the city library"
    return [
        Dialogue(
            "picture_ticket",
            [_user(read, "ticket")],
            "Orange: a train ticket.",
            "NORTH RAILWAY, coach 4, seat 21, fare 9.80.",
        ),
        Dialogue(
            "picture_sign",
            [_user(read, "sign")],
            "Green: a sign at a door.",
            "CITY LIBRARY, open 10 to 18, closed on Sunday.",
        ),
        Dialogue(
            "picture_plan",
            [_user(read, "plan")],
            "Blue: a plan of four rooms.",
            "GROUND FLOOR with kitchen, hall, study and garage.",
        ),
        Dialogue(
            "compare_ticket_sign",
            [_user(compare, "ticket", "sign")],
            "First orange, then green.",
            f"The first is {ticket}, the second is {sign}.",
        ),
        Dialogue(
            "compare_sign_ticket",
            [_user(compare, "sign", "ticket")],
            "First green, then orange.",
            f"The first is {sign}, the second is {ticket}.",
        ),
    ]


_MINUTES = (
    "Now the minutes of the meeting. Anna opened it at nine and thanked everyone for coming in "
    "the rain. Ben read the list of open tasks, and most of them were done. The new printer "
    "stands in the corner of the second room, but nobody has found its manual yet. Clara asked "
    "for a better lamp above the long table. David will talk to the baker about fresh bread on "
    "Tuesday. The plants near the door need water, and the big one needs a larger pot. Eva "
    "counted the chairs: two are broken and one is missing. The summer trip goes to the lake, "
    "by train if the fares stay low, else by bus. Gina closed the meeting at eleven and invited "
    "all to tea with cake."
)


def _long(locker: str) -> Dialogue:
    text = f"The locker number is {locker}. {_MINUTES} What is the locker number?"
    return Dialogue(
        f"long_{locker}",
        [_user(text)],
        "It stood at the very start.",
        f"The locker number is {locker}.",
    )


def _hello() -> Dialogue:
    return Dialogue("hello", [_user("Hello!")], "A greeting.", "Hello! What can I do for you?")


#: All dialogues, in the order in which the demo asks them.
DIALOGUES: tuple[Dialogue, ...] = (
    _hello(),
    *_arithmetic(),
    *_weather("Oslo"),
    *_weather("Lima"),
    *_pictures(),
    _long("3862"),
    _long("7049"),
)
