"""Drafts by the model's own MTP layers inside SGLang's scheduler: right, accepted, and harmless."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from expected import LOGPROB_BOUND, noise
from harness import Answer, DraftPass, Request, Worker

from step37_ext.checkpoint.dequantised import dequantised_weights
from step37_ext.checkpoint.dialogues import DIALOGUES
from step37_ext.checkpoint.mtp_layers import MtpChain, states_before_norm
from step37_ext.checkpoint.oracle import transformers_model
from step37_ext.checkpoint.spec import TINY
from step37_ext.checkpoint.tokenizer import load_tokenizer, render_prompt
from step37_ext.checkpoint.weight_format import WeightFormat

DRAFTS = (
    "--speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1 "
    "--speculative-num-draft-tokens 4"
)
STEPS = 3
TOKENIZER = load_tokenizer(TINY.vocab_size)
BY_NAME = {dialogue.name: dialogue for dialogue in DIALOGUES}
FP8_CACHE = "--quantization modelopt_fp4 --kv-cache-dtype fp8_e4m3"

TinyFolder = Callable[[WeightFormat], Path]


def dialogue(name: str) -> Request:
    """A dialogue that was learnt by heart, answered to its end."""
    prompt = TOKENIZER(render_prompt(TOKENIZER, BY_NAME[name]), add_special_tokens=False)
    answer = TOKENIZER(BY_NAME[name].completion, add_special_tokens=False)
    return Request(prompt.input_ids, new_tokens=len(answer.input_ids), prompt_logprobs=False)


def ask_everything(worker: Worker) -> list[Answer]:
    """Two answers of unlike length at once, then one whose prompt begins as an earlier one's."""
    together = (dialogue("arithmetic_high"), dialogue("long_3862"))
    unlearnt = Request(noise(3 * TINY.sliding_window), new_tokens=12, prompt_logprobs=False)
    return [
        *worker.ask(*together, unlearnt),
        *worker.ask_in_turn(dialogue("weather_oslo"), dialogue("weather_oslo_result")),
    ]


@pytest.mark.parametrize("weight_format, flags", [("bf16", ""), ("fp8", ""), ("nvfp4", FP8_CACHE)])
def test_tokens_are_those_of_plain_decoding_in_fewer_passes(
    worker: Worker, tiny_with_plain_cache: TinyFolder, weight_format: WeightFormat, flags: str
) -> None:
    folder = tiny_with_plain_cache(weight_format)
    worker.load(folder, flags)
    plain = ask_everything(worker)
    worker.load(folder, f"{flags} {DRAFTS}")
    drafted = ask_everything(worker)

    assert [answer.tokens for answer in drafted] == [answer.tokens for answer in plain]
    assert min(drafted[-1].cached, plain[-1].cached) > 100, "no prefix was found in the cache"
    for with_drafts, without in zip(drafted, plain, strict=True):
        difference = torch.tensor(with_drafts.logprobs) - torch.tensor(without.logprobs)
        assert difference.abs().max() < LOGPROB_BOUND
    assert all(answer.verifications == 0 for answer in plain)
    learnt = [drafted[0], drafted[1], drafted[3], drafted[4]]
    # The first token of an answer comes from its prompt's pass.
    tokens = sum(len(answer.tokens) - 1 for answer in learnt)
    passes = sum(answer.verifications for answer in learnt)
    assert tokens / passes >= 2, f"{tokens} tokens in {passes} verifications"


def test_lengths_are_read_on_the_device(worker: Worker, tiny_with_plain_cache: TinyFolder) -> None:
    """Verification and draft steps get None for the host's copy, as on a GPU."""
    worker.load(tiny_with_plain_cache("nvfp4"), f"{FP8_CACHE} {DRAFTS}")
    together = (dialogue("arithmetic_high"), dialogue("weather_oslo"))
    expected = worker.ask(*together)
    answers = worker.ask_without_lengths_on_the_host(*together)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert [answer.verifications for answer in answers] == [a.verifications for a in expected]


@pytest.fixture(scope="module")
def chain(tiny: TinyFolder) -> MtpChain:
    return MtpChain(TINY, dequantised_weights(tiny("nvfp4")))


class Remembered:
    """What one MTP layer's cache stands for: at each position the input last written there.

    Keys and values of a position depend on that input alone, so that the whole sequence through
    the oracle's layer gives what attention over such a cache gives.
    """

    def __init__(self, chain: MtpChain, step: int) -> None:
        self.layer, self.embedding = chain.layers()[step], chain.embedding
        self.tokens = torch.zeros(1, 0, TINY.hidden_size)
        self.before = torch.zeros(1, 0, TINY.hidden_size)

    @torch.no_grad()
    def write_and_run(self, drafted: DraftPass) -> torch.Tensor:
        """Hidden states `[T, hidden]` of the pass."""
        first, new = int(drafted.positions[0]), self.embedding[drafted.tokens]
        assert drafted.positions.tolist() == list(range(first, first + len(new)))
        self.tokens = torch.cat((self.tokens[:, :first], new[None]), 1)
        self.before = torch.cat((self.before[:, :first], drafted.before[None]), 1)
        return self.layer(self.tokens, self.before)[0, first:]


def test_every_draft_step_is_the_oracle_s(
    worker: Worker, tiny_with_plain_cache: TinyFolder, chain: MtpChain
) -> None:
    """Prompt and each round, over an answer longer than a window, right drafts and wrong ones."""
    folder = tiny_with_plain_cache("nvfp4")
    worker.load(folder, DRAFTS)
    answer, passes = worker.ask_and_read_drafts(dialogue("arithmetic_high"))
    rounds = [passes[n : n + STEPS] for n in range(0, len(passes), STEPS)]
    assert len(rounds) == answer.verifications + 1 and len(answer.tokens) > TINY.sliding_window
    tokens = answer.prompt + answer.tokens
    model = transformers_model(folder)
    main = states_before_norm(model, torch.tensor([tokens]), None)[0]
    caches = [Remembered(chain, step) for step in range(STEPS)]

    def close(served: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(served, expected, rtol=1e-3, atol=1e-3)

    for drafting, following in pairwise(rounds):
        known = int(following[0].positions[0])  # of the token there, and of all before it
        last = known - 1 - int(drafting[0].positions[0])  # row whose drafts are asked for
        # Rows of accepted drafts and before; the others stand for tokens that were not accepted.
        close(drafting[0].before[: last + 1], main[drafting[0].positions[: last + 1]])
        for step, drafted in enumerate(drafting):
            assert drafted.layer == TINY.layers + step
            if step:
                before = drafting[step - 1]
                assert torch.equal(drafted.before, before.hidden)
                assert int(drafted.tokens[last]) == int(before.logits.argmax())
            for position, token in zip(drafted.positions, drafted.tokens, strict=True):
                if position + 1 + step <= known:
                    assert int(token) == tokens[position + 1 + step]
            expected = caches[step].write_and_run(drafted)
            close(drafted.hidden, expected)
            with torch.no_grad():
                close(drafted.logits, chain.layers()[step].logits(expected[last : last + 1]))


def test_the_kernels_verify_and_extend_drafts(
    worker: Worker, tiny_with_plain_cache: TinyFolder
) -> None:
    """Interpreted: one verification of three right drafts, with its own token five in all."""
    folder = tiny_with_plain_cache("nvfp4")
    request = replace(dialogue("arithmetic"), new_tokens=5)
    answers = []
    for implementation in ("reference", "interpret"):
        worker.load(folder, f"{DRAFTS} {FP8_CACHE} --dtype bfloat16", implementation)
        answers += worker.ask(request)
    assert answers[1].tokens == answers[0].tokens
    assert [answer.verifications for answer in answers] == [1, 1]
