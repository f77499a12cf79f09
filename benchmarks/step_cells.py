"""The step benchmark's cells: decode and prefill of the whole model, their work and memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.attention_cells import BATCHES, CONTEXTS, NEW_TOKENS, PAGE_SIZE, stored_pages
from benchmarks.harness.cells import COUNTED_ON, GIB, Cell, Setting
from benchmarks.shapes import TEXT
from benchmarks.step_data import CACHE
from step37_ext.deploy import roofline
from step37_ext.deploy.memory import Quant, release, weights_per_gpu
from step37_ext.deploy.roofline import Formats, Step, heads_of
from step37_ext.deploy.work import routed_experts
from step37_ext.model.config import LayerShape, TextShape
from step37_ext.model.parallel import Parallel

FORMATS: tuple[Quant, ...] = ("nvfp4", "fp8")  # of the two releases that are served
DENSE = ("bf16", "fp8")
SKEWS = {"uniform": 0.0, "zipf": 1.0}
RANKS = (1, 4)  # one rank of so many, without the sums over them
DEPTH = len(TEXT.layers)

_CHECKED_COPIES = 4  # of fp32 keys or values that the reference holds at once
_FIXED = ("embedding", "first norm", "lm_head")  # operations that a step has once


@dataclass(frozen=True)
class Settings:
    """What a cell's settings say; `context` is of decode, `new` of prefill."""

    operation: str
    weights: Quant
    dense: str
    ranks: int
    routing: str
    layers: int
    batch: int = 1
    context: int = 0
    new: int = 0

    @classmethod
    def of(cls, cell: Cell) -> Settings:
        """Those of a cell of `cells`."""
        found = cell.settings
        sizes = {name: int(found[name]) for name in ("batch", "context", "new") if name in found}
        return cls(
            cell.operation,
            found["format"],  # type: ignore[arg-type]
            str(found["dense"]),
            int(str(found["parallel"]).removeprefix("TP").removesuffix("-rank")),
            str(found["routing"]),
            int(found["layers"]),
            **sizes,
        )

    @property
    def tokens(self) -> int:
        """Tokens of the forward pass."""
        return self.new or self.batch

    def shown(self) -> dict[str, Setting]:
        """As the tables and `--only` have them."""
        common: dict[str, Setting] = {
            "format": self.weights,
            "dense": self.dense,
            "parallel": "TP1" if self.ranks == 1 else f"TP{self.ranks}-rank",
            "routing": self.routing,
            "layers": self.layers,
        }
        if self.new:
            return common | {"new": self.new}
        return common | {"batch": self.batch, "context": self.context}


def cells(layers: int = DEPTH) -> list[Cell]:
    """Every cell, of a model of that many of the layers."""
    return _all(lambda *model: layers)


def cells_within(total: float) -> list[Cell]:
    """Every cell, of as many layers of each model as a GPU with so many bytes can be given."""
    return _all(lambda weights, dense, ranks: depth_within(total, weights, dense, ranks))


def depth_within(total: float, weights: Quant, dense: str, ranks: int) -> int:
    """The most layers with which a batch of 64 and 8k of context fits; 1 where none does."""
    settings = Settings("decode", weights, dense, ranks, "uniform", 0, batch=64, context=8192)
    for layers in range(DEPTH, 1, -1):
        chosen = chosen_layers(TEXT, layers)
        if cell(TEXT, chosen, replace(settings, layers=layers)).memory <= COUNTED_ON * total:
            return layers
    return 1


def _all(depth: Callable[[Quant, str, int], int]) -> list[Cell]:
    return [cell(TEXT, chosen_layers(TEXT, one.layers), one) for one in _settings(depth)]


def _settings(depth: Callable[[Quant, str, int], int]) -> list[Settings]:
    found = []
    for weights in FORMATS:
        for dense in DENSE:
            for ranks in RANKS:
                layers = depth(weights, dense, ranks)
                for routing in SKEWS:
                    for batch in BATCHES:
                        for context in CONTEXTS:
                            found.append(
                                Settings(
                                    "decode",
                                    weights,
                                    dense,
                                    ranks,
                                    routing,
                                    layers,
                                    batch=batch,
                                    context=context,
                                )  # fmt: skip
                            )
                for new in NEW_TOKENS:
                    found.append(
                        Settings("prefill", weights, dense, ranks, "uniform", layers, new=new)
                    )
    return found


def cell(text: TextShape, chosen: Sequence[int], settings: Settings) -> Cell:
    """The cell of these settings with the layers `chosen` of a text model."""
    part = replace(text, layers=tuple(text.layers[index] for index in chosen))
    return Cell(
        "step",
        settings.operation,
        settings.shown(),
        _priority(settings),
        f"{settings.weights} {settings.dense} {settings.ranks} {settings.layers}",
        step_of(part, settings).total,
        memory(part, settings),
    )


def _priority(settings: Settings) -> int:
    """0 is measured first: the served release at batch 1 and 64 with 8k of context."""
    later = 2 * (settings.weights != FORMATS[0]) + (settings.dense != "bf16")
    later += (settings.ranks != 1) + 2 * (settings.routing != "uniform")
    if settings.operation == "prefill":
        return later + 1 + (settings.new != 8192)
    return later + (settings.batch not in (1, 64)) + (settings.context != 8192)


def chosen_layers(text: TextShape, count: int) -> tuple[int, ...]:
    """Which layers stand for the model where only `count` of them are run.

    Each kind (dense or experts, full or sliding) keeps its share, rounded by largest remainders;
    of a kind those spread evenly over its layers.

    Raises:
        ValueError: count is not between 1 and the model's layers.
    """
    depth = len(text.layers)
    if not 1 <= count <= depth:
        raise ValueError(f"--layers is {count}, expected 1 to the model's {depth} layers")
    kinds: dict[tuple[bool, str], list[int]] = {}
    for index, layer in enumerate(text.layers):
        kinds.setdefault(_kind(layer), []).append(index)
    share = {kind: len(of) * count / depth for kind, of in kinds.items()}
    taken = {kind: int(part) for kind, part in share.items()}
    by_remainder = sorted(kinds, key=lambda kind: taken[kind] - share[kind])
    for kind in by_remainder[: count - sum(taken.values())]:
        taken[kind] += 1
    chosen: list[int] = []
    for kind, of in kinds.items():
        chosen += (of[place * len(of) // taken[kind]] for place in range(taken[kind]))
    return tuple(sorted(chosen))


def _kind(layer: LayerShape) -> tuple[bool, str]:
    return layer.is_moe, layer.attention.kind


def described(text: TextShape, chosen: Sequence[int]) -> str:
    """The kinds of the chosen layers beside the whole model's, in words."""
    have = Counter(_kind(text.layers[index]) for index in chosen)
    whole = Counter(_kind(layer) for layer in text.layers)
    kinds = (
        f"{have[kind]} of {whole[kind]} {'experts' if kind[0] else 'dense'} {kind[1]}"
        for kind in whole
    )
    return ", ".join(kinds).replace("_attention", "")


def step_of(part: TextShape, settings: Settings, distinct: float | None = None) -> Step:
    """The performance model's step; with the number of distinct experts measured, if given."""
    formats = Formats(settings.weights, CACHE, settings.dense)
    parallel, skew = Parallel(settings.ranks), SKEWS[settings.routing]
    if settings.new:
        step = roofline.prefill(part, formats, parallel, settings.new, skew=skew)
    else:
        sizes = (settings.batch, settings.context)
        step = roofline.decode_step(part, formats, parallel, *sizes, skew)
    if distinct is None:
        return step
    tokens = settings.tokens
    real = routed_experts(
        tokens, part.hidden_size, part.top_k, part.moe_intermediate // settings.ranks,
        distinct, tokens * part.top_k, settings.weights,
    )  # fmt: skip
    operations = (
        replace(one, work=real) if one.name == "routed experts" else one for one in step.operations
    )
    return replace(step, operations=tuple(operations))


def scaled_time(
    time: float, outside: float, run: Step, whole: Step, bandwidth: float, flops: dict[str, float]
) -> float:
    """A whole model's time, from that of a model of some of its layers.

    What is outside the layers is as long in both. The layers' time grows as their floors do, so
    that the kinds of layers need not have the very shares that they have in the whole model.

    Args:
        time, outside: measured, of the step that was run and of what it does outside its layers.
        run, whole: the steps.
        bandwidth, flops: that the floors are taken at.
    """
    ratio = in_layers(whole, bandwidth, flops) / in_layers(run, bandwidth, flops)
    return outside + (time - outside) * ratio


def in_layers(step: Step, bandwidth: float, flops: dict[str, float]) -> float:
    """The floor, in microseconds, of what a step does in its layers."""
    operations = (one for one in step.operations if one.name not in _FIXED)
    return sum(one.floor(bandwidth, flops) for one in operations)


def memory(part: TextShape, settings: Settings) -> float:
    """Bytes on the device: weights, caches, activations, and what the check holds besides.

    Weights in FP8 that are made of BF16 ones at load count as BF16, which they are at first.
    """
    model = replace(release(), text=part)
    by_part = weights_per_gpu(model, settings.weights, settings.ranks, drafts=False)
    weights = sum(by_part.values()) - by_part["vision"]
    moe = max(1, sum(layer.is_moe for layer in part.layers))
    head = part.vocab_size // settings.ranks * part.hidden_size * 4
    check = by_part["experts"] / moe + head + _checked_keys(part, settings)
    return weights + _caches(part, settings) + _activations(part, settings) + check + GIB


def _caches(part: TextShape, settings: Settings) -> float:
    total = 0
    for layer in part.layers:
        of = heads_of(layer.attention, settings.ranks)
        if settings.new:
            slots = -(-settings.new // PAGE_SIZE) * PAGE_SIZE
        else:
            first, end = stored_pages(of, settings.context)
            slots = settings.batch * (end - first) * PAGE_SIZE
        total += of.kv_bytes(slots, CACHE)
    return total


def _activations(part: TextShape, settings: Settings) -> float:
    """Of the widest operation; each expert's part of a token is held until they are added."""
    widest = max(
        heads_of(layer.attention, settings.ranks).qkv_width for layer in part.layers
    )  # qkv, and q beside it
    pairs = part.top_k * (part.hidden_size + part.moe_intermediate // settings.ranks)
    columns = 2 * widest + pairs + 8 * part.hidden_size
    return 2.0 * settings.tokens * columns


def _checked_keys(part: TextShape, settings: Settings) -> float:
    keys = max(settings.context, 1)
    heads = heads_of(part.layers[0].attention, settings.ranks)
    return _CHECKED_COPIES * 4 * keys * heads.kv * heads.dim
