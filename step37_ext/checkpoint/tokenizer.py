"""A byte-level BPE tokenizer with the release's special tokens, trained on the dialogues."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from step37_ext.checkpoint.dialogues import DIALOGUES, Dialogue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
TURN_END = "<|im_end|>"

#: Tokens 0, 1, 2 and those of turns and pictures: not part of the text that a parser sees.
CONTROL_TOKENS = (
    BOS,
    EOS,
    PAD,
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<patch_start>",
    "<patch_end>",
    "<patch_newline>",
    "<|im_start|>",
    TURN_END,
)
#: One token each too, but `special=False`: a server that drops special tokens when it decodes
#: must leave these in, because the reasoning and tool-call parsers look for their text.
MARKUP_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)


def build_tokenizer(vocab_size: int) -> Tokenizer:
    """Train the tokenizer on the dialogues, with at most `vocab_size` tokens.

    Deterministic: the same dialogues and template give the same merges.
    """
    smallest = len(CONTROL_TOKENS) + len(MARKUP_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(f"vocab_size = {vocab_size}: must be at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        # Digits stay apart, so that a number is read and written digit by digit.
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKUP_TOKENS),
        min_frequency=2,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in MARKUP_TOKENS]
    )
    return tokenizer


def _corpus() -> list[str]:
    """The stretches of text between special tokens, in every prompt and completion."""
    renderer = _with_template(Tokenizer(models.BPE()))
    texts = [render_prompt(renderer, dialogue) + dialogue.completion for dialogue in DIALOGUES]
    markers = "|".join(re.escape(token) for token in (*CONTROL_TOKENS, *MARKUP_TOKENS))
    return [stretch for text in texts for stretch in re.split(markers, text) if stretch]


@cache
def load_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer as `transformers` sees it, with the chat template."""
    return _with_template(build_tokenizer(vocab_size))


def _with_template(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **tokenizer_config()
    )


def tokenizer_config() -> dict[str, Any]:
    """The fields of tokenizer_config.json that do not follow from tokenizer.json."""
    return {
        "bos_token": BOS,
        "eos_token": TURN_END,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }


def render_prompt(tokenizer: PreTrainedTokenizerFast, dialogue: Dialogue) -> str:
    """The prompt text of `dialogue`, one `<im_patch>` per picture, ending after `<think>\\n`."""
    messages = [_with_parsed_arguments(message) for message in dialogue.messages]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **dialogue.request
    )
    assert isinstance(text, str)
    return text


def _with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A tool call's arguments as a mapping, which is how servers hand them to a template."""
    if "tool_calls" not in message:
        return message
    calls = [
        call
        | {"function": call["function"] | {"arguments": json.loads(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}
