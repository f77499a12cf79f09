"""Which implementation runs, and what is said when none does."""

import pytest

from step37_kernels import dispatch
from step37_kernels.dispatch import OPERATIONS, Target, candidates, choose, register
from step37_kernels.reference.attention import attend

CPU = Target("cpu", None, "bf16")
HOPPER = Target("cuda", (9, 0), "nvfp4")


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Every test registers beside the references alone, and not under the caller's STEP37_IMPL."""
    references = {
        operation: [known for known in registered if known.name == "reference"]
        for operation, registered in dispatch._registry.items()
    }
    monkeypatch.setattr(dispatch, "_registry", references)
    monkeypatch.delenv("STEP37_IMPL", raising=False)


def needs_cuda(target: Target) -> tuple[bool, str]:
    return target.device_type == "cuda", "compiled" if target.capability else "needs an NVIDIA GPU"


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("target", [CPU, HOPPER])
def test_the_reference_serves_everything(operation, target):
    chosen = choose(operation, target)
    assert (chosen.name, chosen.operation) == ("reference", operation) and chosen.reason


def test_the_implementation_can_be_called():
    assert choose("attend", CPU).function is attend
    register("activation", "double", lambda x: 2 * x, needs_cuda, priority=1)
    assert choose("activation", HOPPER)(21) == 42


def test_the_highest_usable_priority_wins():
    register("attend", "fast", attend, needs_cuda, priority=10)
    register("attend", "slow", attend, needs_cuda, priority=5)
    assert choose("attend", HOPPER).name == "fast"
    assert choose("attend", CPU).name == "reference"
    listed = candidates("attend", CPU)
    assert [(c.name, c.usable) for c in listed] == [
        ("fast", False),
        ("slow", False),
        ("reference", True),
    ]
    assert listed[0].reason == "needs an NVIDIA GPU"


def test_the_environment_forces_one(monkeypatch):
    register("attend", "fast", attend, needs_cuda, priority=10)
    monkeypatch.setenv("STEP37_IMPL", "reference")
    chosen = choose("attend", HOPPER)
    assert chosen.name == "reference" and "STEP37_IMPL" in chosen.reason
    monkeypatch.setenv("STEP37_IMPL", "fast")
    with pytest.raises(ValueError, match="fast \\(needs an NVIDIA GPU\\)"):
        choose("attend", CPU)
    monkeypatch.setenv("STEP37_IMPL", "trition")
    with pytest.raises(ValueError, match="'trition', known for 'attend': fast, reference"):
        choose("attend", CPU)


def test_an_operation_without_the_forced_name_gets_the_best(monkeypatch):
    register("attend", "fast", attend, needs_cuda, priority=10)
    monkeypatch.setenv("STEP37_IMPL", "fast")
    assert choose("attend", HOPPER).name == "fast"
    assert choose("route", HOPPER).name == "reference"


def test_weights_are_prepared_by_the_chosen_one():
    register("experts", "fast", attend, needs_cuda, priority=10, prepare=lambda w: ("tiles", w))
    assert choose("experts", HOPPER).prepare("w") == ("tiles", "w")
    assert choose("experts", CPU).prepare("w") == "w"


def test_unknown_operations_are_named():
    for call in (choose, candidates):
        with pytest.raises(ValueError, match="unknown operation 'atend', expected one of route"):
            call("atend", CPU)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'route' already has an implementation 'reference'"):
        register("route", "reference", attend, needs_cuda, priority=1)


def test_nothing_usable_says_what_there_is(monkeypatch):
    monkeypatch.setitem(dispatch._registry, "route", [])
    register("route", "fast", attend, needs_cuda, priority=1)
    with pytest.raises(ValueError, match="'route' is usable on Target.*fast \\(needs an NVIDIA"):
        choose("route", CPU)
