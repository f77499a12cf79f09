"""The table of operations: what is chosen, remembered and logged."""

from __future__ import annotations

import logging

import pytest

from step37_ext.model.operations import OperationTable, layer_ranges
from step37_kernels import dispatch
from step37_kernels.reference.experts import experts


def on_cpu() -> OperationTable:
    return OperationTable(dispatch.Target("cpu", None, "nvfp4"))


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([], ""),
        ([7], "7"),
        ([0, 1, 2, 5], "0-2,5"),
        ([5, 3, 4], "3-5"),
        ([0, 0, 1, 1, 3], "0-1,3"),  # two parts of a layer by one implementation
        ([1, 3, 5], "1,3,5"),
        (list(range(45)), "0-44"),
    ],
)
def test_layer_ranges(layers: list[int], text: str) -> None:
    assert layer_ranges(layers) == text


def test_choose_gives_the_implementation() -> None:
    chosen = on_cpu().choose("experts", 3, "nvfp4")
    assert (chosen.name, chosen.function) == ("reference", experts)


def test_choose_asks_for_the_layers_own_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared expert of an NVFP4 model is BF16, and may have another implementation."""
    asked = []

    def choose(operation: str, target: dispatch.Target) -> dispatch.Implementation:
        asked.append((operation, target))
        return dispatch.Implementation("some", operation, "why", print, lambda weights: weights)

    monkeypatch.setattr(dispatch, "choose", choose)
    on_cpu().choose("activation", 3, "bf16")
    assert asked == [("activation", dispatch.Target("cpu", None, "bf16"))]


@pytest.mark.parametrize(
    ("capability", "served", "reason"),
    [
        ((7, 5), {"reference"}, "not triton (needs sm_80 or later, this is sm_75)"),
        ((8, 0), {"reference", "triton"}, "not triton (needs sm_89 or later, this is sm_80)"),
    ],
)
def test_a_gpu_that_has_no_kernel_gets_a_table_that_says_so(
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    served: set[str],
    reason: str,
) -> None:
    """Turing has none at all, Ampere none for FP8 experts: the reference runs, and says why."""
    table = OperationTable(dispatch.Target("cuda", capability, "fp8"))
    names = {
        table.choose(operation, 1, weights).name
        for operation, weights in (("experts", "fp8"), ("route", "bf16"), ("attend", "-"))
    }
    assert names == served
    with caplog.at_level(logging.INFO, logger="step37_ext.model.operations"):
        table.log()
    (logged,) = caplog.messages
    rows = [line.split("\u2502") for line in logged.splitlines() if "\u2502" in line]
    words = " ".join(row[-2].strip() for row in rows)  # a long reason goes over several lines
    assert reason in words


def test_unknown_operation() -> None:
    with pytest.raises(ValueError, match="unknown operation 'softmax'"):
        on_cpu().choose("softmax", 0, "bf16")


def test_the_logged_table(caplog: pytest.LogCaptureFixture) -> None:
    table = on_cpu()
    for layer in (1, 2, 3):
        table.choose("experts", layer, "nvfp4")
    table.choose("activation", 0, "bf16")
    table.note("attend", 0, "-", "backend triton", "--attention-backend")
    with caplog.at_level(logging.INFO, logger="step37_ext.model.operations"):
        table.log()
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in caplog.messages[0].splitlines()
        if line.startswith("│")
    ]
    reason = dispatch.choose("experts", table.target).reason
    assert rows == [
        ["experts", "1-3", "nvfp4", "reference", reason],
        ["activation", "0", "bf16", "reference", reason],
        ["attend", "0", "-", "backend triton", "--attention-backend"],
    ]
