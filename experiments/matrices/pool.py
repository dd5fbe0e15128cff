"""Cells on every core, a process each: compiling is nearly all of the work, and one compilation uses one core."""

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Any

from experiments.matrices.cells import Cell

Outcome = tuple[Cell, dict[str, Any]]
BETWEEN = 10  # cells from one clearing of JAX's caches to the next
_COUNT = itertools.count(1)


def start(cores: Any) -> None:
    """What a worker does first: takes a core, and sets the compiler to be quick."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})  # before JAX counts the cores for its threads
    quick()


def quick() -> None:
    """A program that runs 20 small steps is not worth optimising."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)


def work(cell: Cell) -> dict[str, Any]:
    import jax

    from experiments.matrices.run import run

    if next(_COUNT) % BETWEEN == 0:  # what was compiled for former cells stays in memory otherwise
        jax.clear_caches()
    return run(cell)


def outcomes(cells: Sequence[Cell], workers: int, until: float | None = None) -> Iterator[Outcome]:
    """Each cell with its outcome, as they end. until: the time (of time.monotonic) after which none is begun."""

    def open_() -> bool:
        return until is None or time.monotonic() < until

    if workers <= 1 or not cells:
        if cells:
            quick()
        for cell in cells:
            if open_():
                yield cell, work(cell)
        return
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(workers))
    context = get_context("spawn")  # a forked JAX does not work
    cores = context.Queue()
    for i in range(workers):
        cores.put(available[i % len(available)])
    waiting = list(cells)
    running: dict[Future[dict[str, Any]], Cell] = {}
    with ProcessPoolExecutor(workers, context, start, (cores,)) as pool:
        while running or (waiting and open_()):
            while waiting and len(running) < workers and open_():
                cell = waiting.pop(0)
                running[pool.submit(work, cell)] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
