"""From hardware, format and workload to a plan that fits, or to the nearest ones that do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import get_args

from step37_ext.deploy.hardware import GPUS, Gpu
from step37_ext.deploy.memory import (
    DEFAULT_SLIDING_RATIO,
    CacheType,
    MemoryPlan,
    Quant,
    Settings,
    Workload,
    cache_cost,
    plan_memory,
    release,
    sliding_tokens,
    weights_per_gpu,
)
from step37_ext.model.dense_format import DENSE_FORMATS, DenseFormat
from step37_ext.model.parallel import Parallel, check_parallel, check_vision_heads

DEFAULT_CONTEXT, DEFAULT_CONCURRENCY = 32768, 1

_SMALLEST_CHUNK = 4096  # below it SGLang's least reserve of 10 GiB counts
_MOST_NODES = 4
_QUANTS: tuple[Quant, ...] = get_args(Quant)


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        count: GPUs in each node.
        context, concurrency: tokens of a request with its answer, and requests at once; None
            leaves SGLang's limit alone and plans for the defaults.
        dense_weights: format of the weights beside the routed experts, which releases have in BF16.
    """

    gpu: str
    count: int
    quant: Quant
    nodes: int = 1
    context: int | None = None
    concurrency: int | None = None
    reasoning: bool = False
    tools: bool = False
    mtp: bool = False
    dense_weights: DenseFormat = "bf16"

    @property
    def gpus(self) -> int:
        return self.count * self.nodes

    @property
    def workload(self) -> Workload:
        return Workload(self.context or DEFAULT_CONTEXT, self.concurrency or DEFAULT_CONCURRENCY)


@dataclass(frozen=True)
class Plan:
    """A request with everything decided.

    Attributes:
        expert_choices: every --ep-size that is possible with this --tp.
        nearest: requests that fit, nearest first; empty if this one does.
    """

    request: Request
    gpu: Gpu
    parallel: Parallel
    expert_choices: tuple[int, ...]
    cache: CacheType
    memory: MemoryPlan
    nearest: tuple[Request, ...]

    @property
    def fits(self) -> bool:
        return self.memory.fits


def make_plan(request: Request) -> Plan:
    """Decide parallelism and memory for a request.

    Raises:
        ValueError: an option's value is not possible, with the option, the value and what is.
    """
    _check(request)
    plan = _plan(request)
    return plan if plan.fits else replace(plan, nearest=tuple(_nearest(plan)))


def _check(request: Request) -> None:
    if request.gpu not in GPUS:
        raise ValueError(f"--gpu {request.gpu}: allowed are {', '.join(GPUS)}")
    if request.quant not in _QUANTS:
        raise ValueError(f"--quant {request.quant}: allowed are {', '.join(_QUANTS)}")
    if request.dense_weights not in DENSE_FORMATS:
        raise ValueError(
            f"--dense-weights {request.dense_weights}: allowed are {', '.join(DENSE_FORMATS)}"
        )
    gpu, longest = GPUS[request.gpu], release().text.max_position
    if not 1 <= request.count <= gpu.per_node:
        raise ValueError(
            f"--count {request.count}: a node of {gpu.name} has 1 to {gpu.per_node} GPUs; "
            "use --nodes for more"
        )
    if request.nodes < 1:
        raise ValueError(f"--nodes {request.nodes}: at least 1")
    if request.concurrency is not None and request.concurrency < 1:
        raise ValueError(f"--concurrency {request.concurrency}: at least 1")
    if request.context is not None and not 1 <= request.context <= longest:
        raise ValueError(f"--context {request.context}: the model reads 1 to {longest} tokens")
    try:
        _check_ranks(request.gpus, 1, request.quant)
    except ValueError as error:
        possible = ", ".join(str(n) for n in range(1, 33) if _possible(n, 1, request.quant))
        raise ValueError(
            f"--count {request.count} with --nodes {request.nodes}: {error}; "
            f"possible are {possible} GPUs in all"
        ) from None


def _check_ranks(tp_size: int, ep_size: int, quant: Quant) -> None:
    check_parallel(release().text, Parallel(tp_size, ep_size), quant)
    check_vision_heads(tp_size, release().vision.heads)


def _possible(tp_size: int, ep_size: int, quant: Quant) -> bool:
    try:
        _check_ranks(tp_size, ep_size, quant)
    except ValueError:
        return False
    return True


def _plan(request: Request) -> Plan:
    gpu, tp_size = GPUS[request.gpu], request.gpus
    choices = tuple(n for n in range(1, tp_size + 1) if _possible(tp_size, n, request.quant))
    # The deployment page's choice: whole experts on each GPU for the quantised formats.
    ep_size = 1 if request.quant == "bf16" else max(choices)
    cache: CacheType = "fp8_e4m3" if request.quant == "nvfp4" else "bf16"
    return Plan(
        request=request,
        gpu=gpu,
        parallel=Parallel(tp_size, ep_size),
        expert_choices=choices,
        cache=cache,
        memory=_first_that_fits(request, gpu, cache),
        nearest=(),
    )


def _first_that_fits(request: Request, gpu: Gpu, cache: CacheType) -> MemoryPlan:
    """The plan with the fewest flags that fits; the last one tried if none does."""
    model, workload, tp_size = release(), request.workload, request.gpus
    window = model.text.window or 0
    weights = weights_per_gpu(model, request.quant, tp_size, request.mtp, request.dense_weights)
    cost = cache_cost(model.text, cache, tp_size, request.mtp)
    graph_batch = gpu.graph_batch(tp_size)
    if request.concurrency is not None:
        graph_batch = min(graph_batch, request.concurrency)
    for settings in _settings(gpu, workload, window):
        plan = plan_memory(
            gpu,
            weights,
            cost,
            workload,
            settings,
            tp_size=tp_size,
            graph_batch=graph_batch,
            window=window,
        )
        if plan.fits:
            break
    return plan


def _settings(gpu: Gpu, workload: Workload, window: int) -> Iterator[Settings]:
    """SGLang's defaults, then a smaller sliding pool, then smaller prefill chunks besides."""
    yield Settings(gpu.prefill_chunk, DEFAULT_SLIDING_RATIO)
    chunk = gpu.prefill_chunk
    while chunk >= _SMALLEST_CHUNK:
        share = sliding_tokens(workload, window, chunk) / workload.tokens
        yield Settings(chunk, min(DEFAULT_SLIDING_RATIO, math.ceil(share * 100) / 100))
        chunk //= 2


def _nearest(plan: Plan) -> Iterator[Request]:
    """Less work on the same GPUs, more GPUs, a smaller format: the first that fits of each."""
    request = plan.request
    if less := _less_work(request):
        yield less
    for candidates in (_more_gpus(request), _smaller_formats(request)):
        if found := next(filter(_fits, candidates), None):
            yield found


def _fits(request: Request) -> bool:
    return _plan(request).fits


def _less_work(request: Request) -> Request | None:
    workload = request.workload
    fewer = _largest(workload.concurrency, lambda n: _fits(replace(request, concurrency=n)))
    if fewer:
        return replace(request, concurrency=fewer)
    alone = replace(request, concurrency=1)
    context = _largest(workload.context, lambda n: _fits(replace(alone, context=n)))
    return replace(alone, context=context) if context >= 1024 else None


def _largest(below: int, fits: Callable[[int], bool]) -> int:
    """The largest number under `below` that fits, or 0; whatever is under a fit fits too."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _more_gpus(request: Request) -> Iterator[Request]:
    for nodes in range(request.nodes, _MOST_NODES + 1):
        for count in range(1, GPUS[request.gpu].per_node + 1):
            if count * nodes > request.gpus and _possible(count * nodes, 1, request.quant):
                yield replace(request, count=count, nodes=nodes)


def _smaller_formats(request: Request) -> Iterator[Request]:
    for quant in _QUANTS[_QUANTS.index(request.quant) + 1 :]:
        yield replace(request, quant=quant)
