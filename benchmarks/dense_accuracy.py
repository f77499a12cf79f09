"""Error of FP8 weights beside the routed experts: of each linear layer, and of a whole model.

    python -m benchmarks.dense_accuracy [--markdown FILE]

Runs the kernels themselves: on the GPU, or in Triton's interpreter where there is none. The model
is the small trained one, in transformers' own classes and fp32; a machine's first run trains it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from step37_kernels import interpret

if not torch.cuda.is_available():
    interpret.enable()  # before anything imports triton

from benchmarks.harness.cells import relative_l2
from benchmarks.shapes import ATTENTION, HIDDEN, INTERMEDIATE, TEXT
from step37_kernels.formats import fp8_block
from step37_kernels.formats.fp8_words import FP8Words
from step37_kernels.linear import linear

COLUMNS_OF = {
    "qkv, gate and up": HIDDEN,
    "o of full layers": ATTENTION["full"].num_heads * ATTENTION["full"].head_dim,
    "o of sliding layers": ATTENTION["sliding"].num_heads * ATTENTION["sliding"].head_dim,
    "dense down": TEXT.dense_intermediate,
    "shared down": INTERMEDIATE,
}
"""The linear layers by what their sums go over."""
DISTRIBUTIONS = ("Gaussian", "Student's t, 3 degrees", "8 columns 30 times larger")
_GATED = ("gate", "up", "down")
DENSE = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"{block}.{name}_proj" for block in ("mlp", "shared_experts") for name in _GATED),
)
"""Ends of transformers' names of the layers that are made FP8."""


@dataclass(frozen=True)
class Errors:
    """Relative L2 errors of one linear layer's output.

    Args:
        kernel: the kernel's against fp64 with the same FP8 weights.
        rows: of the FP8 weights with a scale per row, against the original ones, both in fp64.
        blocks: the same with the releases' scale per block of 128x128.
    """

    kernel: float
    rows: float
    blocks: float


def draw(distribution: str, rows: int, columns: int) -> Tensor:
    """Weights in bf16, [rows, columns]."""
    torch.manual_seed(columns)
    if distribution.startswith("Student"):
        weight = torch.distributions.StudentT(3.0).sample(torch.Size((rows, columns)))
    else:
        weight = torch.randn(rows, columns)
    if distribution.startswith("8 columns"):
        weight[:, torch.randperm(columns)[:8]] *= 30
    return (weight * columns**-0.5).bfloat16()


def errors(distribution: str, columns: int, rows: int = 256, tokens: int = 8) -> Errors:
    """The errors of a layer over `columns` columns, for Gaussian activations."""
    weight = draw(distribution, rows, columns)
    x = torch.randn(tokens, columns).bfloat16()
    exact = x.double() @ weight.double().T
    by_row, by_block = fp8_block.quantize_rows(weight), fp8_block.quantize(weight)
    rounded, blocks = (x.double() @ w.dequantize(torch.float64).T for w in (by_row, by_block))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packed = FP8Words.pack(fp8_block.quantize_rows(weight.to(device)))
    got = linear(x.to(device), packed).cpu()
    return Errors(*(relative_l2(*p) for p in ((got, rounded), (rounded, exact), (blocks, exact))))


@contextmanager
def dense_in_fp8(model: Any, head: bool = False) -> Iterator[None]:
    """Transformers' `model` with these layers' weights rounded to FP8, and `head` if asked for."""
    layers = [
        module
        for name, module in model.model.language_model.layers.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(DENSE)
    ] + [model.lm_head] * head
    stored = [layer.weight.data for layer in layers]
    for layer in layers:
        layer.weight.data = fp8_block.quantize_rows(layer.weight.data).dequantize(torch.float32)
    try:
        yield
    finally:
        for layer, weight in zip(layers, stored, strict=True):
            layer.weight.data = weight


@dataclass(frozen=True)
class Answers:
    """Of a model, over the tokens of all dialogues' right answers.

    Args:
        logprobs: fp32 [tokens, vocabulary].
        margin: the least lead of a right token over the best wrong one, in logits.
    """

    logprobs: Tensor
    margin: float

    def kl_from(self, other: Answers) -> Tensor:
        """KL divergence of this model from `other` at every token, in nats."""
        return (other.logprobs.exp() * (other.logprobs - self.logprobs)).sum(-1)


@torch.no_grad()
def answers(model: Any, examples: list[Any]) -> Answers:
    """What `model` says to the `checkpoint.oracle.Example`s."""
    from step37_ext.checkpoint.oracle import hidden_states, margins

    parts = []
    for example in examples:
        hidden = hidden_states(model, torch.tensor([example.tokens]), example.features)
        logits = model.lm_head(hidden[0, len(example.prompt) - 1 : -1])
        parts.append(logits.float().log_softmax(-1))
    return Answers(torch.cat(parts), min(margins(model, examples).values()))


def small_model() -> dict[str, tuple[float, float, float]]:
    """Mean and largest KL from the BF16 model, and the least margin, by what is quantised."""
    from step37_ext.checkpoint.dialogues import DIALOGUES
    from step37_ext.checkpoint.make import make_tiny
    from step37_ext.checkpoint.oracle import encode, transformers_model
    from step37_ext.checkpoint.spec import TINY

    found: dict[str, Answers] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in ("bf16", "fp8", "nvfp4"):
            make_tiny(Path(folder, form), form)  # type: ignore[arg-type]
            model = transformers_model(Path(folder, form))
            if form == "bf16":
                examples = encode(TINY, model, DIALOGUES)
            routed = {"bf16": "", "fp8": "routed experts FP8", "nvfp4": "routed experts NVFP4"}[
                form
            ]
            found[routed or "nothing"] = answers(model, examples)
            with dense_in_fp8(model):
                found[", ".join(filter(None, (routed, "the rest FP8")))] = answers(model, examples)
            if form == "bf16":
                with dense_in_fp8(model, head=True):
                    found["the rest FP8, output head too"] = answers(model, examples)
    plain = found["nothing"]
    return {
        name: (float(one.kl_from(plain).mean()), float(one.kl_from(plain).max()), one.margin)
        for name, one in found.items()
    }


@click.command()
@click.option("--markdown", "path", type=click.Path(path_type=Path), help="Write the tables here.")
def main(path: Path | None) -> None:
    """Error of FP8 weights beside the routed experts."""
    layers: list[tuple[str, ...]] = [
        ("weights", "layer", "kernel", "rows, ours", "blocks of 128x128")
    ]
    for distribution in DISTRIBUTIONS:
        for name, columns in COLUMNS_OF.items():
            one = errors(distribution, columns)
            shown = (f"{100 * value:.3g}%" for value in (one.kernel, one.rows, one.blocks))
            layers.append((distribution, name, *shown))
    whole: list[tuple[str, ...]] = [("quantised", "mean KL", "largest KL", "least margin")]
    for name, (mean, largest, margin) in small_model().items():
        whole.append((name, f"{mean:.1e}", f"{largest:.1e}", f"{margin:.2f}"))
    lines = []
    for heading, *rows in (layers, whole):
        table = Table(*heading)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        lines += [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows)]
        lines.append("")
    if path is not None:
        path.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
