"""Which implementation of an operation runs: chosen once at start, with the reason.

`register` adds implementations, `choose` takes the usable one with the highest priority, and the
environment variable STEP37_IMPL forces one by name.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from step37_kernels.reference.activation import swiglu_step
from step37_kernels.reference.attention import attend, prologue_into_cache
from step37_kernels.reference.experts import experts
from step37_kernels.reference.linear import linear
from step37_kernels.reference.page_tables import page_tables
from step37_kernels.reference.route import route
from step37_kernels.reference.shared_expert import shared_expert

ENVIRONMENT_VARIABLE = "STEP37_IMPL"
OPERATIONS = (
    "route", "experts", "shared_expert", "activation", "linear", "page_tables", "prologue", "attend"
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """What an operation is to run on.

    Args:
        device_type: torch's name, for example "cpu" or "cuda".
        capability: CUDA compute capability such as (9, 0); None where there is none.
        weight_format: "bf16", "fp8" or "nvfp4".
        dtype: what the model computes in.
    """

    device_type: str
    capability: tuple[int, int] | None
    weight_format: str
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Implementation:
    """A chosen implementation: call it as the operation's reference is called.

    `reason` also says why those that would have been preferred are not usable.
    `prepare` turns the operation's weights into what the function takes, once at load.
    """

    name: str
    operation: str
    reason: str
    function: Callable[..., Any]
    prepare: Callable[[Any], Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the implementation."""
        return self.function(*args, **kwargs)


@dataclass(frozen=True)
class Candidate:
    """An implementation seen against a target: usable or not, and why."""

    name: str
    operation: str
    usable: bool
    reason: str


@dataclass(frozen=True)
class _Registered:
    name: str
    function: Callable[..., Any]
    supports: Callable[[Target], tuple[bool, str]]
    priority: int
    prepare: Callable[[Any], Any]


def _as_it_is(weights: Any) -> Any:
    return weights


_registry: dict[str, list[_Registered]] = {operation: [] for operation in OPERATIONS}


def register(
    operation: str,
    name: str,
    function: Callable[..., Any],
    supports: Callable[[Target], tuple[bool, str]],
    priority: int,
    prepare: Callable[[Any], Any] = _as_it_is,
) -> None:
    """Add an implementation.

    Args:
        operation: one of OPERATIONS.
        name: what STEP37_IMPL calls it.
        function: takes and returns what the reference of that operation does.
        supports: tells for a target whether it can run there, and why or why not.
        priority: of several usable ones the highest runs; the reference has 0, and what is below
            it runs only where STEP37_IMPL asks for it.
        prepare: what is to be done to the weights once, before the first call.

    Raises:
        ValueError: the operation is unknown, or has an implementation of that name already.
    """
    registered = _of(operation)
    if any(known.name == name for known in registered):
        raise ValueError(f"operation {operation!r} already has an implementation {name!r}")
    registered.append(_Registered(name, function, supports, priority, prepare))
    registered.sort(key=lambda known: -known.priority)


def candidates(operation: str, target: Target) -> list[Candidate]:
    """Every implementation of an operation, the preferred first, and why it is usable or not.

    Raises:
        ValueError: the operation is unknown.
    """
    return [Candidate(known.name, operation, *known.supports(target)) for known in _of(operation)]


def choose(operation: str, target: Target) -> Implementation:
    """The implementation that runs on `target`: forced by STEP37_IMPL, or the best usable one.

    An operation that has no implementation of the forced name, though another operation has, gets
    the best usable one.

    Raises:
        ValueError: the operation is unknown, STEP37_IMPL names no implementation of any, or nothing
            is usable; the message lists what there is.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    registered = _of(operation)
    if forced:
        if not any(known.name == forced for others in _registry.values() for known in others):
            names = ", ".join(known.name for known in registered)
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE} is {forced!r}, known for {operation!r}: {names}"
            )
        named = [known for known in registered if known.name == forced]
        forced, registered = (forced, named) if named else (None, registered)
    refusals: list[str] = []
    for known in registered:
        usable, reason = known.supports(target)
        if usable:
            why = f"forced by {ENVIRONMENT_VARIABLE}; {reason}" if forced else reason
            if refusals:
                why = f"{why}; not {', '.join(refusals)}"
            return Implementation(known.name, operation, why, known.function, known.prepare)
        refusals.append(f"{known.name} ({reason})")
    raise ValueError(
        f"no implementation of {operation!r} is usable on {target}: {', '.join(refusals)}"
    )


def _of(operation: str) -> list[_Registered]:
    if operation not in _registry:
        raise ValueError(
            f"unknown operation {operation!r}, expected one of {', '.join(OPERATIONS)}"
        )
    return _registry[operation]


def _reference_supports(target: Target) -> tuple[bool, str]:
    return True, "PyTorch in fp32"


for _operation, _function in (
    ("linear", linear),
    ("route", route),
    ("experts", experts),
    ("shared_expert", shared_expert),
    ("activation", swiglu_step),
    ("page_tables", page_tables),
    ("prologue", prologue_into_cache),
    ("attend", attend),
):
    register(_operation, "reference", _function, _reference_supports, priority=0)
