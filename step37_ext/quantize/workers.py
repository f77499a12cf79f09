"""Shards in several processes, which end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, MutableSequence, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from typing import Any

import torch

from step37_ext.quantize.convert import Advance, Places, convert_shard
from step37_ext.quantize.plan import Shard
from step37_ext.quantize.source import Source

_POLL_SECONDS = 0.2


def convert_all(
    places: Places, shards: Sequence[Shard], jobs: int, advance: Advance
) -> dict[str, dict[str, Any]]:
    """Convert every shard, `jobs` at a time; with one job, here.

    Returns:
        Each shard's record (see `convert_shard`), by file name.

    Raises:
        ValueError, OSError: as `convert_shard`; no further shard is begun.
        RuntimeError: a worker process was killed.
    """
    if jobs == 1:
        source = Source(places.source)
        return {shard.file: convert_shard(source, places, shard, advance) for shard in shards}
    context = multiprocessing.get_context("spawn")
    done = context.RawArray("q", len(shards))  # bytes; each slot has one writer, hence no lock
    with _pool(context, jobs, (places, shards, done, jobs)) as pool:
        futures = {pool.submit(_convert, index): index for index in range(len(shards))}
        pending, seen = set(futures), 0
        while pending:
            finished, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
            total = sum(done)
            advance(total - seen)
            seen = total
            for future in finished:
                future.result()
        return {shards[index].file: future.result() for future, index in futures.items()}


@contextmanager
def _pool(context: Any, jobs: int, arguments: tuple[Any, ...]) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes are ended at once when something goes wrong here."""
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(jobs, context, _start, arguments) as pool:
        try:
            yield pool
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
                process.join()
            if isinstance(error, BrokenProcessPool):
                raise RuntimeError(
                    "a worker process was killed, perhaps for want of memory; finished files are "
                    "kept: run the same command again, with fewer --jobs"
                ) from None
            raise


_worker: tuple[Source, Places, Sequence[Shard], MutableSequence[int]] | None = None


def _start(places: Places, shards: Sequence[Shard], done: MutableSequence[int], jobs: int) -> None:
    """Prepare a worker process."""
    global _worker
    _worker = (Source(places.source), places, shards, done)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches it too: no traceback of its own
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, which would write on for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _convert(index: int) -> dict[str, Any]:
    assert _worker is not None
    source, places, shards, done = _worker

    def advance(count: int) -> None:
        done[index] += count

    return convert_shard(source, places, shards[index], advance)
