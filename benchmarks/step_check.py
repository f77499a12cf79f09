"""Whether the step's result is right: logits of a few of its layers against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.expert_data import BF16_ROUNDING
from benchmarks.harness.cells import Accuracy, relative_l2
from benchmarks.harness.timing import captured
from benchmarks.step_data import Routed, recorded_routing
from benchmarks.step_model import Batch, DecoderLayer, MoEBlock, StepModel
from benchmarks.step_weights import SCORE_STD, Maker, ReferenceNorm, Spec, reference
from step37_ext.model import forward
from step37_ext.model.config import TextShape

_BEHIND_WINDOW = 256  # tokens of a prefill that are checked beyond the first window
_CHECKED_KEYS = 65536  # whose fp32 copies the reference holds at once
_ROUNDINGS_PER_LAYER = 12
"""To bf16: after each norm, qkv, q, attention, o_proj, the intermediate, the experts' parts, their
sum, and the residual twice; the head gate's logits and the shared expert's intermediate beside."""


def checked_layers(spec: Spec) -> list[int]:
    """Places of one layer of each kind (dense or experts, full or sliding, clamped or not)."""
    kinds: dict[tuple[bool, str, bool], int] = {}
    for place, index in enumerate(spec.chosen):
        layer = spec.text.layers[index]
        clamped = layer.routed_limit is not None or layer.shared_limit is not None
        kinds.setdefault((layer.is_moe, layer.attention.kind, clamped), place)
    return sorted(kinds.values())


def checked_tokens(text: TextShape) -> int:
    """The first tokens of a prefill, so many that the last quarter does not see the first."""
    return (text.window or 0) + _BEHIND_WINDOW


def allowed(layers: int, prefill: bool) -> float:
    """The largest relative L2 distance of logits after `layers` layers that is rounding.

    A rounding to bf16 is off by 0.42 of the largest error in the root mean square; independent
    ones add up as squares. What is rounded is a part of the residual stream, so that none weighs
    more than its own size, but for scores, whose relative error is SCORE_STD times as large in the
    probabilities: all are counted so.

    Keys and values differ by such an error e before they are rounded to e4m3, whose codes lie
    2^-3.5 apart. A share e / 2^-3.5 of them falls on the other side of a border and moves by
    2^-3.5: sqrt(e * 2^-3.5). In decode that is one key of many. In prefill it is all keys of a
    layer, and scores make SCORE_STD times as much of it, of an attention that is at most half of
    what it is added to.
    """
    rounded = 0.42 * BF16_ROUNDING * math.sqrt(_ROUNDINGS_PER_LAYER * layers + 2)
    borders = math.sqrt(rounded * 2.0**-3.5) if prefill else 0.0
    return SCORE_STD * (rounded + borders / 2 * math.sqrt(layers))


def check(spec: Spec, model: StepModel, batch: Batch) -> Accuracy:
    """Logits of a model of `checked_layers` by its kernels, and by the reference in fp32.

    The reference takes the routing that the kernels chose (which tests of the router check):
    scores that differ in the last bits would exchange experts now and then, and with them whole
    rows. Decode is compared on up to four sequences, prefill on the last quarter of its first
    `checked_tokens`, which see only those.
    """
    places = checked_layers(spec)
    part, few = batch.of_layers(places), replace(model, layers=_renumbered(model.layers, places))
    if batch.last is None:
        rows = _sequences(part)
        smaller = part.sequences(rows)
    else:
        tokens = min(checked_tokens(spec.text), len(batch.input_ids))
        rows = torch.arange(tokens, device=batch.input_ids.device)
        part = replace(part, last=rows[-max(1, tokens // 4) :])
        smaller = replace(part.beginning(tokens), last=part.last)
    with recorded_routing(few.moe_blocks()) as routing:
        found = few(part)
    if part.last is None:
        found = found[rows]
    said = [Routed(one.weights[rows], one.ids[rows]) for one in routing]
    expected = reference_logits(spec, model, places, smaller, said)
    return Accuracy(
        relative_l2(found.float(), expected), allowed(len(places), prefill=batch.last is not None)
    )


def check_graph(run: Callable[[], Tensor], layers: int) -> Accuracy:
    """A replay of a decode step's CUDA graph beside the same step launched one by one.

    What a capture can do wrong (leave out a kernel, keep a number that the host had) changes whole
    rows. Not asked to be equal to the bit, since a library may choose another algorithm in a graph:
    that is rounding, within the bound of a model of so many layers.
    """
    expected = run()
    logits: list[Tensor] = []
    replay = captured([lambda: logits.append(run())])
    logits[-1].zero_()  # what the replay does not write is seen
    replay()
    return Accuracy(relative_l2(logits[-1].float(), expected.float()), allowed(layers, False))


@torch.no_grad()
def reference_logits(
    spec: Spec, model: StepModel, places: Sequence[int], batch: Batch, routing: Sequence[Routed]
) -> Tensor:
    """fp32 logits of some of the model's layers, which are made anew one after the other."""
    maker = Maker(spec, reference, exact=True)
    said = iter(routing)

    def layers() -> Iterator[DecoderLayer]:
        for place, chosen in enumerate(places):
            layer = maker.layer(chosen)
            layer.self_attn.place = place
            if isinstance(layer.feed_forward, MoEBlock):
                one = next(said)
                layer.feed_forward.route = lambda *_, one=one: (one.weights, one.ids)
            yield layer

    hidden = torch.nn.functional.embedding(batch.input_ids, model.embedding).float()
    norm = ReferenceNorm(model.norm.weight, spec.text.rms_norm_eps)
    hidden, _ = forward.decoder(layers(), norm, batch.positions, hidden, batch)
    hidden = hidden if batch.last is None else hidden[batch.last]
    return maker.head()(hidden)[0]


def _renumbered(layers: Sequence[DecoderLayer], places: Sequence[int]) -> list[DecoderLayer]:
    """The layers at `places`, which take their caches from 0 on."""
    chosen = [layers[place] for place in places]
    return [
        replace(layer, self_attn=replace(layer.self_attn, place=place))
        for place, layer in enumerate(chosen)
    ]


def _sequences(batch: Batch) -> Tensor:
    """Up to four sequences, spread over the batch, whose keys are not more than fit."""
    count = len(batch.input_ids)
    longest = int(batch.positions.max()) + 1
    few = max(1, min(4, count, _CHECKED_KEYS // longest))
    return torch.linspace(0, count - 1, few, device=batch.positions.device).round().long()
