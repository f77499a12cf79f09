"""This project's whole decode step and prefill, as the benchmark runs them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import step_breakdown
from benchmarks.attention_cells import PAGE_SIZE
from benchmarks.expert_data import DEVICE
from benchmarks.harness.cells import Accuracy, Cell, Trial
from benchmarks.harness.limits import Measured
from benchmarks.harness.timing import Timing, captured, time_calls
from benchmarks.shapes import TEXT
from benchmarks.step_cells import (
    SKEWS,
    Settings,
    chosen_layers,
    described,
    scaled_time,
    step_of,
)
from benchmarks.step_check import check, check_graph
from benchmarks.step_data import (
    CACHE,
    decode_batch,
    distinct_experts,
    prefill_batch,
    skew_routing,
)
from benchmarks.step_model import Batch, StepModel
from benchmarks.step_norm import chosen as chosen_norm
from benchmarks.step_weights import Maker, Spec
from step37_ext.model.operations import OperationTable
from step37_kernels.dispatch import Target


@dataclass(frozen=True)
class Prepared:
    """A model on the device."""

    spec: Spec
    model: StepModel
    implementations: dict[str, str]


class Step37Step:
    """The model's own sequence of operations (`step37_ext.model.forward`) with our kernels."""

    name = "step37"

    def version(self) -> str:
        return "this checkout"  # a result records the hash of its sources

    def available(self) -> tuple[bool, str]:
        return True, self.version()

    def refuses(self, cell: Cell) -> str | None:
        return None

    def prepare(self, cell: Cell) -> Prepared:
        settings = Settings.of(cell)
        layers = chosen_layers(TEXT, settings.layers)
        return made(Spec(TEXT, layers, settings.ranks, settings.weights, settings.dense, DEVICE))

    def trial(self, prepared: Prepared, cell: Cell) -> Trial:
        return trial(prepared, Settings.of(cell))


def made(spec: Spec) -> Prepared:
    """The model of `spec` with the implementations that a server on its device would choose."""
    capability = torch.cuda.get_device_capability() if spec.device.type == "cuda" else None
    table = OperationTable(Target(spec.device.type, capability, spec.weights))
    model = Maker(spec, table.choose).model()
    return Prepared(spec, model, table.chosen() | {"norm": chosen_norm(spec.device)[2]})


def inputs(spec: Spec, model: StepModel, settings: Settings) -> Batch:
    """The cell's inputs; the routers are skewed as it says."""
    skew_routing(model, SKEWS[settings.routing])
    if settings.new:
        return prefill_batch(spec.part, spec.ranks, settings.new, spec.device)
    sizes = (settings.batch, settings.context)
    return decode_batch(spec.part, spec.ranks, *sizes, spec.device)


def trial(prepared: Prepared, settings: Settings) -> Trial:
    """One forward pass of the model, decode in a CUDA graph, prefill as a server launches it."""
    spec, model = prepared.spec, prepared.model
    batch = inputs(spec, model, settings)
    distinct = distinct_experts(model, batch)
    graph = not settings.new

    def run() -> Any:
        return model(batch)

    def details(time: Timing, limits: Measured) -> dict[str, Any]:
        found = said(prepared, settings, distinct, time.median, limits)
        if len(spec.chosen) < len(spec.text.layers):
            outside = time_calls([lambda: outside_layers(model, batch)], graph).median
            found["scaled"] = scaled(spec, settings, distinct, time.median, outside, limits)
        try:
            rows = step_breakdown.profiled(captured([run]) if graph else run)
        except Exception as error:  # no profiler here; the time stands without it
            return found | {"no_breakdown": f"{type(error).__name__}: {error}"[:300]}
        return found | {"breakdown": [asdict(row) for row in rows]}

    def checked() -> Accuracy:
        found = check(spec, model, batch)
        if not (graph and found.holds):
            return found
        replayed = check_graph(run, len(spec.chosen))
        return found if replayed.holds else replayed

    work = step_of(spec.part, settings, distinct).total
    return Trial([run], checked, work, graph, details)


@torch.no_grad()
def outside_layers(model: StepModel, batch: Batch) -> torch.Tensor:
    """What a step does before and after its layers: embedding, norm, head."""
    hidden = model.norm(torch.nn.functional.embedding(batch.input_ids, model.embedding))
    return model.head(hidden if batch.last is None else hidden[batch.last])[0]


def said(
    prepared: Prepared, settings: Settings, distinct: float, us: float, limits: Measured
) -> dict[str, Any]:
    """What a result says besides its time."""
    spec = prepared.spec
    floor = step_of(spec.part, settings, distinct).floor(limits.read, limits.flops)
    return {
        "tokens_per_s": settings.tokens / us * 1e6,
        "floor_us": floor,
        "of_floor": floor / us,
        "distinct_experts": distinct,
        "layers": described(spec.text, spec.chosen),
        "implementations": prepared.implementations,
        "cache": f"{CACHE}, pages of {PAGE_SIZE} tokens",
        "not_in_it": "sampling" if spec.ranks == 1 else "sampling, sums over ranks",
    }


def scaled(
    spec: Spec,
    settings: Settings,
    distinct: float,
    us: float,
    outside: float,
    limits: Measured,
) -> dict[str, Any]:
    """The figure of the whole model, and how it was come by."""
    run, whole = (step_of(text, settings, distinct) for text in (spec.part, spec.text))
    time = scaled_time(us, outside, run, whole, limits.read, limits.flops)
    return {
        "us": time,
        "tokens_per_s": settings.tokens / time * 1e6,
        "of_floor": whole.floor(limits.read, limits.flops) / time,
        "outside_layers_us": outside,
        "how": f"scaled from {settings.layers} of {len(spec.text.layers)} layers "
        f"({described(spec.text, spec.chosen)}) by the layers' floors, not measured",
    }
