"""The performance model: what one step of the model has to move and multiply, and its least time.

A step's floor is the sum of its operations' floors, since one runs after the other; an operation's
is the longer of moving its bytes and multiplying its products (Williams, Waterman, Patterson 2009).
No launch, no wait and no latency is in it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from step37_ext.deploy import work
from step37_ext.deploy.expected_experts import chances, distinct
from step37_ext.deploy.work import Heads, Work
from step37_ext.model.config import AttentionShape, TextShape
from step37_ext.model.parallel import Parallel

_DECODE_LAUNCHES = 2  # the parts of a long context's keys are added by a second kernel


@dataclass(frozen=True)
class Formats:
    """Number formats of a step.

    Attributes:
        experts: the routed experts' weights: "bf16", "fp8" or "nvfp4".
        cache: keys and values: "bf16" or "fp8".
        dense: the attention's, dense MLPs' and shared expert's weights: "bf16" or "fp8". The
            router's, the head gates' and lm_head's are BF16 in any case.
        activations: what the routed experts multiply: "bf16", "fp8" or "nvfp4".
    """

    experts: str
    cache: str = "fp8"
    dense: str = "bf16"
    activations: str = "bf16"


@dataclass(frozen=True)
class Operation:
    """One operation of a step, the same in `times` layers; `launches` are this project's of one."""

    name: str
    times: int
    work: Work
    launches: int = 1

    def floor(self, bandwidth: float, flops: Mapping[str, float]) -> float:
        """The least microseconds of all of them."""
        return self.times * self.work.floor(bandwidth, flops)


@dataclass(frozen=True)
class Step:
    """One rank's part of a forward pass.

    Attributes:
        tokens: in the pass.
        operations: in the order of a layer.
        all_reduces: sums over the ranks, one after the other; 0 with one rank.
        sent_bytes: what the rank has to send in all of them together.
    """

    tokens: int
    operations: tuple[Operation, ...]
    all_reduces: int
    sent_bytes: float

    def floor(self, bandwidth: float, flops: Mapping[str, float]) -> float:
        """The least microseconds of the operations, without communication."""
        return math.fsum(one.floor(bandwidth, flops) for one in self.operations)

    @property
    def launches(self) -> int:
        """Kernels of all operations, without communication."""
        return sum(one.times * one.launches for one in self.operations)

    @property
    def total(self) -> Work:
        """All operations' work as one (their types of products are not told apart)."""
        return work.added(
            *(
                Work(
                    one.times * one.work.stream_bytes,
                    one.times * one.work.bytes,
                    one.times * one.work.flops,
                    one.work.matmul,
                )
                for one in self.operations
            )
        )


def heads_of(shape: AttentionShape, tp_size: int) -> Heads:
    """A layer's attention on one rank; a rank holds at least one KV head."""
    return Heads(
        shape.num_heads // tp_size,
        max(1, shape.num_kv_heads // tp_size),
        shape.head_dim,
        shape.rotary_dim,
        shape.window,
    )


def decode_step(
    text: TextShape,
    formats: Formats,
    parallel: Parallel,
    batch: int,
    context: int,
    skew: float = 0.0,
    new: int = 1,
) -> Step:
    """The last `new` tokens of each of `batch` sequences of `context` tokens, these included.

    Args:
        skew: of the routing, see `expected_experts.chances`.
        new: 1, or with drafts those and the token before them. All tokens of a step are taken to
            choose their experts independently, neighbours of a sequence too.
    """
    tokens = batch * new
    attention = _attention_of_last(formats, batch, context, new)
    return _step(text, formats, parallel, tokens, tokens, skew, attention, _DECODE_LAUNCHES)


def drafted_step(
    text: TextShape,
    with_mtp: TextShape,
    formats: Formats,
    parallel: Parallel,
    batch: int,
    context: int,
) -> Step:
    """One verification of a draft by every MTP layer, and those layers' passes for the next ones.

    What SGLang itself does between the passes (sampling, moving tokens on) is not in it.

    Args:
        with_mtp: the text model read with its MTP layers; each proposes one token.
        batch, context: as of `decode_step`.
    """
    new = text.num_mtp_layers + 1
    verified = decode_step(text, formats, parallel, batch, context, new=new)
    passes = [
        _draft_pass(with_mtp, draft, formats, parallel, batch, context, new)
        for draft in range(text.num_mtp_layers)
    ]
    steps = [verified, *passes]
    return Step(
        verified.tokens,
        tuple(operation for step in steps for operation in step.operations),
        sum(step.all_reduces for step in steps),
        math.fsum(step.sent_bytes for step in steps),
    )


def _draft_pass(
    with_mtp: TextShape,
    draft: int,
    formats: Formats,
    parallel: Parallel,
    batch: int,
    context: int,
    new: int,
) -> Step:
    """One MTP layer, in BF16, over all `new` tokens of each sequence, with one row of logits."""
    hidden, tokens = with_mtp.hidden_size, batch * new
    alone = replace(with_mtp, layers=(with_mtp.layers[with_mtp.mtp_layer(draft)],))
    attention = _attention_of_last(formats, batch, context, new)
    plain = replace(formats, dense="bf16")
    block = _step(alone, plain, parallel, tokens, batch, 0.0, attention, _DECODE_LAUNCHES)
    joining = (
        Operation("input norm", 2, work.elementwise(tokens, hidden, hidden)),
        Operation("join", 1, work.elementwise(tokens, 2 * hidden, 2 * hidden)),
        Operation("eh_proj", 1, work.linear(tokens, 2 * hidden, hidden)),  # whole on every rank
    )
    operations = (*joining, *block.operations)
    named = tuple(replace(one, name=f"draft {draft}: {one.name}") for one in operations)
    return replace(block, operations=named)


def _attention_of_last(
    formats: Formats, batch: int, context: int, new: int
) -> Callable[[Heads], Work]:
    return lambda of: work.decode_attention(of, batch, context, formats.cache, new)


def prefill(
    text: TextShape,
    formats: Formats,
    parallel: Parallel,
    new: int,
    prefix: int = 0,
    skew: float = 0.0,
) -> Step:
    """`new` tokens of one sequence after a cached prefix, with logits of the last one."""

    def attention(of: Heads) -> Work:
        return work.prefill_attention(of, new, prefix, formats.cache)

    return _step(text, formats, parallel, new, 1, skew, attention, 1)


def _step(
    text: TextShape,
    formats: Formats,
    parallel: Parallel,
    tokens: int,
    logits: int,
    skew: float,
    attention: Callable[[Heads], Work],
    attention_launches: int,
) -> Step:
    hidden, ranks = text.hidden_size, parallel.tp_size
    moe = sum(layer.is_moe for layer in text.layers)
    head = work.linear(logits, hidden, text.vocab_size // ranks)
    operations = (
        Operation("embedding", 1, work.elementwise(tokens, hidden, hidden)),
        # Adds the residual: two rows of hidden in, two out. The first norm has nothing to add.
        Operation("norm", 2 * len(text.layers), work.elementwise(tokens, 2 * hidden, 2 * hidden)),
        Operation("first norm", 1, work.elementwise(tokens, hidden, hidden)),
        *_attention(text, formats, ranks, tokens, attention, attention_launches),
        *_dense_mlp(text, formats, ranks, tokens, len(text.layers) - moe),
        # Two: the logits' products split along K, then scores and top-k.
        Operation("router", moe, work.route(tokens, hidden, text.num_experts, text.top_k), 2),
        Operation(
            "shared expert",
            moe,
            work.shared_expert(tokens, hidden, text.shared_intermediate // ranks, formats.dense),
            2,
        ),
        # Sort, gate-up, down, combine; the intermediate is quantised by one more.
        Operation(
            "routed experts",
            moe,
            _routed(text, formats, parallel, tokens, skew),
            4 + (formats.activations != "bf16"),
        ),
        Operation("lm_head", 1, head),
    )
    used = tuple(one for one in operations if one.times)
    if ranks == 1:
        return Step(tokens, used, 0, 0.0)
    # After attention, after the feed-forward block and after the embedding. Each rank gives away
    # all but its own part of what it summed, and its sum of that part to all others; of the logits
    # it only gives its columns. A switch that sums by itself would need less.
    reduced = (2 * len(text.layers) + 1) * tokens * hidden * 2
    gathered = logits * text.vocab_size * 2
    sent = (2 * reduced + gathered) * (ranks - 1) / ranks
    return Step(tokens, used, 2 * len(text.layers) + 1, sent)


def _attention(
    text: TextShape,
    formats: Formats,
    ranks: int,
    tokens: int,
    attention: Callable[[Heads], Work],
    launches: int,
) -> Iterator[Operation]:
    """Projections, prologue and attention of each kind of layer."""
    hidden = text.hidden_size
    kinds = Counter(heads_of(layer.attention, ranks) for layer in text.layers)
    for of, layers in kinds.items():
        kind = "full" if of.window is None else "sliding"
        rows = of.query * of.dim
        qkv = work.linear(tokens, hidden, of.qkv_width, formats.dense)
        yield Operation(f"qkv, {kind}", layers, qkv)
        if text.has_head_gate:
            yield Operation(f"head gate, {kind}", layers, work.linear(tokens, hidden, of.query))
        yield Operation(f"prologue, {kind}", layers, work.prologue(of, tokens, formats.cache))
        yield Operation(f"attention, {kind}", layers, attention(of), launches)
        output = work.linear(tokens, rows, hidden, formats.dense)
        yield Operation(f"o_proj, {kind}", layers, output)


def _dense_mlp(
    text: TextShape, formats: Formats, ranks: int, tokens: int, layers: int
) -> Iterator[Operation]:
    hidden, columns = text.hidden_size, text.dense_intermediate // ranks
    up = work.linear(tokens, hidden, 2 * columns, formats.dense)
    yield Operation("dense gate-up", layers, up)
    yield Operation("dense activation", layers, work.elementwise(tokens, 2 * columns, columns))
    yield Operation("dense down", layers, work.linear(tokens, columns, hidden, formats.dense))


def _routed(
    text: TextShape, formats: Formats, parallel: Parallel, tokens: int, skew: float
) -> Work:
    """The mean rank's: with whole experts on each (EP), a skew gives some ranks more than that."""
    share = 1 / parallel.ep_size
    return work.routed_experts(
        tokens,
        text.hidden_size,
        text.top_k,
        text.moe_intermediate // (parallel.tp_size // parallel.ep_size),
        share * distinct(tokens, chances(text.num_experts, text.top_k, skew)),
        share * tokens * text.top_k,
        formats.experts,
        formats.activations,
    )
