"""Error of attention over an e4m3 cache, by the types that Q and P are multiplied in.

    python -m benchmarks.attention_accuracy [--markdown FILE]

Needs no GPU: a stand-in follows the kernels' blocks, roundings and order of sums at lengths that
Triton's interpreter cannot reach. `tests/attention/test_accuracy.py` holds it against the
interpreted kernels where they can go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness.cells import relative_l2
from step37_kernels.formats.e4m3 import to_e4m3

HEAD_DIM, GROUP, TOKENS, BLOCK_KEYS = 128, 8, 8, 64
LENGTHS = {"1k": 1024, "4k": 4096, "8k": 8192, "64k": 65536, "256k": 262144}
SPREADS = {"flat": 1.0, "peaked": 4.0}
E4M3, BF16, FP16 = torch.float8_e4m3fn, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Arithmetic:
    """How attention is computed.

    Args:
        name: for the table.
        q, p: the types that queries and probabilities are rounded to, without a scale.
        exponent: probabilities are kept as 2^exponent p.
        out: the type of the output.
        pieces: runs of key blocks that are summed apart and added up at the end (flash-decoding).
    """

    name: str
    q: torch.dtype
    p: torch.dtype
    exponent: float = 0.0
    out: torch.dtype = BF16
    pieces: int = 1


EXTEND = Arithmetic("ours, prefill", FP16, FP16, 15.0)
DECODE = Arithmetic("ours, decode in 16 pieces", FP16, FP16, 15.0, pieces=16)
UNROUNDED = Arithmetic("ours before the output is rounded to bf16", FP16, FP16, 15.0, torch.float32)
OVER_BF16 = Arithmetic("ours over a bf16 cache", BF16, BF16, 15.0)
FP8_Q = Arithmetic("fp8 Q", E4M3, FP16, 15.0)
FP8_Q_AND_P = Arithmetic("fp8 Q and P", E4M3, E4M3)
ROWS = (EXTEND, DECODE, UNROUNDED, FP8_Q, FP8_Q_AND_P)


@dataclass(frozen=True)
class Heads:
    """One KV head's keys and values and the queries that share it, in fp32.

    Args:
        q: [R, D], bf16 values.
        k, v: [L, D] before quantisation; their e4m3 values are what the cache holds.
    """

    q: Tensor
    k: Tensor
    v: Tensor

    def cached(self) -> tuple[Tensor, Tensor]:
        """Keys and values as the cache holds them, fp32 [L, D]."""
        return to_e4m3(self.k).float(), to_e4m3(self.v).float()


def draw(length: int, spread: float, rows: int = GROUP * TOKENS) -> Heads:
    """N(0, 1) keys and values, and queries so that scores have the standard deviation `spread`."""
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(rows, HEAD_DIM, generator=generator) * spread
    k, v = (torch.randn(length, HEAD_DIM, generator=generator) for _ in range(2))
    return Heads(q.to(BF16).float(), k, v)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fp64 attention of q [R, D] over k, v [L, D]: [R, D]."""
    scores = (q.double() @ k.double().T) * HEAD_DIM**-0.5
    return scores.softmax(-1) @ v.double()


def attend(q: Tensor, k: Tensor, v: Tensor, arithmetic: Arithmetic) -> Tensor:
    """The kernels' arithmetic: blocks of 64 keys, running maximum, sums in fp32, [R, D].

    What it cannot show is how a tensor core rounds inside of one block's product.

    Args:
        q: fp32 [R, D].
        k, v: fp32 [L, D], values that the cache's type holds; L a multiple of 64 x pieces.
    """
    scale = torch.tensor(HEAD_DIM**-0.5 * math.log2(math.e))
    rows, pieces = q.shape[0], arithmetic.pieces
    blocks = (pieces, -1, BLOCK_KEYS, HEAD_DIM)
    rounded_q = q.to(arithmetic.q).float()
    largest = torch.full((pieces, rows), -torch.inf)
    total = torch.zeros(pieces, rows)
    acc = torch.zeros(pieces, rows, HEAD_DIM)
    for keys, values in zip(k.view(blocks).unbind(1), v.view(blocks).unbind(1), strict=True):
        score = rounded_q @ keys.mT
        new_largest = largest.maximum(score.amax(-1))
        offset = new_largest * scale - arithmetic.exponent
        p = (score * scale - offset[..., None]).exp2()
        keep = ((largest - new_largest) * scale).exp2()
        total = total * keep + p.sum(-1)
        acc = acc * keep[..., None] + p.to(arithmetic.p).float() @ values
        largest = new_largest
    weight = ((largest - largest.amax(0)) * scale).exp2()
    out = (acc * weight[..., None]).sum(0) / (total * weight).sum(0)[:, None]
    return out.to(arithmetic.out)


def errors(length: int, spread: float) -> dict[str, float]:
    """Relative L2 error of every row of the table at one length.

    Against fp64 over the same cache; the last row is what an e4m3 cache itself costs, fp64 over it
    against fp64 over keys and values before quantisation.
    """
    heads = draw(length, spread)
    k, v = heads.cached()
    expected = exact(heads.q, k, v)
    found = {row.name: relative_l2(attend(heads.q, k, v, row), expected) for row in ROWS}
    k, v = heads.k.to(BF16).float(), heads.v.to(BF16).float()
    over_bf16 = attend(heads.q, k, v, OVER_BF16)
    found[OVER_BF16.name] = relative_l2(over_bf16, exact(heads.q, k, v))
    found["the e4m3 cache itself"] = relative_l2(expected, exact(heads.q, heads.k, heads.v))
    return found


def markdown(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """One table per spread of the scores: rows by arithmetic, columns by length."""
    lines = []
    for spread, by_length in found.items():
        lines += [f"### {spread.capitalize()} (scores of standard deviation {SPREADS[spread]:g})"]
        lines += ["", "| | " + " | ".join(by_length) + " |", "|---" * (len(by_length) + 1) + "|"]
        for name in next(iter(by_length.values())):
            cells = (f"{100 * column[name]:.3g}%" for column in by_length.values())
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


@click.command()
@click.option("--markdown", "path", type=click.Path(path_type=Path), help="Write the tables here.")
def main(path: Path | None) -> None:
    """Error of attention over an e4m3 cache, by the types that Q and P are multiplied in."""
    found = {
        spread: {name: errors(length, width) for name, length in LENGTHS.items()}
        for spread, width in SPREADS.items()
    }
    for spread, by_length in found.items():
        table = Table(title=f"Relative L2 error, {spread}", title_justify="left")
        for column in ("", *by_length):
            table.add_column(column)
        for name in next(iter(by_length.values())):
            table.add_row(name, *(f"{100 * column[name]:.3g}%" for column in by_length.values()))
        Console().print(table)
    if path is not None:
        path.write_text(markdown(found))


if __name__ == "__main__":
    main()
