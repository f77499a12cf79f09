"""Error of the expert layer in each format, and how much of it is the format's own.

    python -m benchmarks.expert_accuracy [--markdown FILE]

Runs the kernels themselves: on the GPU, or in Triton's interpreter where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from step37_kernels import interpret

if not torch.cuda.is_available():
    interpret.enable()  # before anything imports triton

from benchmarks.harness.cells import relative_l2
from step37_kernels.expert_weights import (
    BF16Experts,
    ExpertWeights,
    FP8Experts,
    NVFP4Experts,
    on_device,
)
from step37_kernels.experts.formats import FORMATS, multiplied_as
from step37_kernels.experts.layer import experts, prepare
from step37_kernels.formats import fp8_block, nvfp4
from step37_kernels.reference.activation import swiglu_step

LIMIT = 7.0  # the release's, on its last two layers


@dataclass(frozen=True)
class Errors:
    """Relative L2 errors of a layer's output.

    Args:
        kernel: the kernels' against fp64 with the same quantised weights and plain activations.
        weights: fp64 with quantised weights against fp64 with the original ones.
        together: the kernels' against fp64 with the original weights.
    """

    kernel: float
    weights: float
    together: float


def pairs() -> tuple[tuple[str, str], ...]:
    """Those of FORMATS that run here: the scaled FP4 product is sm_100's."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (10, 0):
        return FORMATS
    return tuple(pair for pair in FORMATS if pair[1] != "nvfp4")


def draw(hidden: int, size: int, tokens: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gate and up rows [E, 2N, K], down rows [E, K, N] and hidden [T, K] in bf16; router [T, E].

    Gaussian, so that every product is of order one and the intermediate as well.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).bfloat16()

    router = torch.rand(tokens, count, generator=generator)
    return (
        normal(count, 2 * size, hidden, scale=hidden**-0.5),
        normal(count, hidden, size, scale=size**-0.5),
        normal(tokens, hidden),
        router / router.sum(1, keepdim=True),
    )


def in_format(w13: Tensor, w2: Tensor, weights: str) -> ExpertWeights:
    """The same experts in one format; scales as the releases have them."""
    if weights == "bf16":
        return BF16Experts(w13, w2)
    gate, up = w13.chunk(2, 1)
    if weights == "fp8":
        return FP8Experts.of(*(fp8_block.quantize(part.float()) for part in (gate, up, w2)))
    return NVFP4Experts.of(*(nvfp4.quantize(part.float()) for part in (gate, up, w2)))


def exact(hidden: Tensor, weights: ExpertWeights, router: Tensor) -> tuple[Tensor, Tensor]:
    """The layer in fp64 with every token through every expert [T, K], and its intermediate."""
    output, intermediates = torch.zeros(hidden.shape, dtype=torch.float64), []
    for e in range(weights.num_experts):
        gate, up, down = (
            part(e, torch.float64) for part in (weights.gate, weights.up, weights.down)
        )
        x = hidden.double()
        intermediate = swiglu_step(torch.cat([x @ gate.T, x @ up.T], 1), LIMIT).double()
        output += router[:, e, None].double() * (intermediate @ down.T)
        intermediates.append(intermediate)
    return output, torch.stack(intermediates)


def errors(hidden_size: int, size: int, tokens: int, count: int) -> dict[tuple[str, str], Errors]:
    """What the kernels add to each format, and what the format itself costs.

    Args:
        hidden_size, size: channels of hidden and of the intermediate.
        tokens, count: tokens, and experts, all of which every token passes.
    """
    w13, w2, hidden, router = draw(hidden_size, size, tokens, count)
    unquantized, _ = exact(hidden, BF16Experts(w13, w2), router)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.arange(count, dtype=torch.int32, device=device).expand(tokens, count).contiguous()
    found = {}
    for form, activations in pairs():
        weights = in_format(w13, w2, form)
        expected, intermediate = exact(hidden, weights, router)
        scales = tuple(
            (x.abs().max() / (6 * 448)).float().to(device) for x in (hidden, intermediate)
        )
        output = experts(
            hidden.to(device),
            prepare(on_device(weights, device), activations),
            router.to(device),
            ids,
            LIMIT,
            activations=activations,
            input_scales=(scales[0], scales[1]),
        ).cpu()
        found[form, activations] = Errors(
            relative_l2(output, expected),
            relative_l2(expected, unquantized),
            relative_l2(output, unquantized),
        )
    return found


COLUMNS = ("weights", "activations", "kernel", "weights' rounding", "together")


def rows(found: dict[tuple[str, str], Errors]) -> list[tuple[str, ...]]:
    """The table's rows, in `COLUMNS`."""
    return [
        (
            form,
            multiplied_as(activations),
            *(f"{100 * value:.3g}%" for value in (error.kernel, error.weights, error.together)),
        )
        for (form, activations), error in found.items()
    ]


@click.command()
@click.option("--markdown", "path", type=click.Path(path_type=Path), help="Write the table here.")
def main(path: Path | None) -> None:
    """Error of the expert layer in each format, and how much of it is the format's own."""
    # The model's hidden size and one rank's share of TP=4; eight experts are a token's top-k.
    found = rows(errors(hidden_size=4096, size=320, tokens=4, count=8))
    where = "on a GPU" if torch.cuda.is_available() else "interpreted"
    table = Table(*COLUMNS, title=f"Relative L2 error, {where}", title_justify="left")
    for row in found:
        table.add_row(*row)
    Console().print(table)
    if path is not None:
        lines = [f"| {' | '.join(row)} |" for row in (COLUMNS, ["---"] * len(COLUMNS), *found)]
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
