"""From nothing to trained, checked and calibrated weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from step37_ext.checkpoint.calibrate import calibrate
from step37_ext.checkpoint.dialogues import DIALOGUES
from step37_ext.checkpoint.init import initial_weights
from step37_ext.checkpoint.mtp_layers import MtpChain, mean_accepted
from step37_ext.checkpoint.oracle import encode, load_model, margins, read_weights
from step37_ext.checkpoint.release_layout import Calibration
from step37_ext.checkpoint.spec import TinySpec
from step37_ext.checkpoint.train import Recipe, train, train_mtp


def teach(spec: TinySpec, recipe: Recipe, *, quiet: bool) -> tuple[dict[str, Tensor], Calibration]:
    """Train a model of `spec` by `recipe` and return its weights with their calibration.

    Weights are rounded to BF16 before they are checked and calibrated, except the router gates
    (an FP8 checkpoint stores them in fp32).

    Raises:
        RuntimeError: two seeds ended with answers that are wrong or too uncertain, or with MTP
            layers whose drafts are too often wrong.
    """
    for seed in (recipe.seed, recipe.seed + 1):
        start = initial_weights(spec, seed)
        model = load_model(spec, start)
        examples = encode(spec, model, DIALOGUES)
        with _progress(recipe, quiet=quiet) as on_step, _all_cores():
            train(model, examples, recipe, on_step)
            weights = _rounded(read_weights(model, start))
            model = load_model(spec, weights)
            chain = MtpChain(spec, weights | _heads_of_main_model(spec, weights))
            train_mtp(model, chain, examples, recipe, on_step)
        weights |= _rounded(chain.weights())
        least = margins(model, examples)
        uncertain = [name for name, margin in least.items() if margin < recipe.least_margin]
        accepted = mean_accepted(model, MtpChain(spec, weights), examples)
        if not uncertain and accepted >= recipe.least_accepted:
            return weights, calibrate(spec, model, examples)
    raise RuntimeError(
        f"training the small model failed: margins below {recipe.least_margin} for "
        f"{', '.join(uncertain) or 'no answer'}, {accepted:.2f} tokens accepted at a time of at "
        f"least {recipe.least_accepted}; please report this with the version of torch"
    )


def _heads_of_main_model(spec: TinySpec, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where training of the MTP layers' heads begins: it is faster from here."""
    heads: dict[str, Tensor] = {}
    for layer in range(spec.layers, spec.layers + spec.mtp_layers):
        prefix = f"model.layers.{layer}.transformer.shared_head"
        heads[f"{prefix}.norm.weight"] = weights["model.norm.weight"]
        heads[f"{prefix}.output.weight"] = weights["lm_head.weight"]
    return heads


@contextmanager
def _progress(recipe: Recipe, *, quiet: bool) -> Iterator[Callable[[float], None]]:
    """A progress bar on standard error; yields what `train` calls after each step."""
    columns = (
        TextColumn("training the small model"),
        BarColumn(),
        TextColumn("step {task.completed}/{task.total}, loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, quiet=quiet)) as progress:
        task = progress.add_task("", total=recipe.steps + recipe.mtp_steps, loss=float("nan"))
        yield lambda loss: progress.update(task, advance=1, loss=loss)


@contextmanager
def _all_cores() -> Iterator[None]:
    """Up to four threads, more do not help at this size, whatever the process was set to."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(4, len(os.sched_getaffinity(0))))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rounded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = ("moe.gate.weight", "router_bias")
    return {n: w if n.endswith(kept) else w.bfloat16().float() for n, w in weights.items()}
