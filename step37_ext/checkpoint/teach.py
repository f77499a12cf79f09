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
from step37_ext.checkpoint.oracle import encode, load_model, margins, read_weights
from step37_ext.checkpoint.release_layout import Calibration
from step37_ext.checkpoint.spec import TinySpec
from step37_ext.checkpoint.train import Recipe, train


def teach(spec: TinySpec, recipe: Recipe, *, quiet: bool) -> tuple[dict[str, Tensor], Calibration]:
    """Train a model of `spec` by `recipe` and return its weights with their calibration.

    Weights are rounded to BF16 before they are checked and calibrated, except the router gates
    (an FP8 checkpoint stores them in fp32).

    Raises:
        RuntimeError: two seeds ended with answers that are wrong or too uncertain.
    """
    for seed in (recipe.seed, recipe.seed + 1):
        start = initial_weights(spec, seed)
        model = load_model(spec, start)
        examples = encode(spec, model, DIALOGUES)
        with _progress(recipe, quiet=quiet) as on_step, _all_cores():
            train(model, examples, recipe, on_step)
        weights = {name: _rounded(name, w) for name, w in read_weights(model, start).items()}
        model = load_model(spec, weights)
        least = margins(model, examples)
        uncertain = [name for name, margin in least.items() if margin < recipe.least_margin]
        if not uncertain:
            return weights, calibrate(spec, model, examples)
    raise RuntimeError(
        f"training the small model failed for {', '.join(uncertain)}: a margin below "
        f"{recipe.least_margin}; please report this with the version of torch"
    )


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
        task = progress.add_task("", total=recipe.steps, loss=float("nan"))
        yield lambda loss: progress.update(task, advance=1, loss=loss)


@contextmanager
def _all_cores() -> Iterator[None]:
    """Up to four threads, more do not help at this size, whatever the process was set to."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(4, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rounded(name: str, tensor: Tensor) -> Tensor:
    if name.endswith(("moe.gate.weight", "router_bias")):
        return tensor
    return tensor.bfloat16().float()
