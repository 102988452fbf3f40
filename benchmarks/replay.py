"""Timing of short CUDA kernels: many in one recorded graph, as a decode step runs them.

Launched one by one, a kernel of a few microseconds is shorter than its launch, and what is timed is the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import structlog
import torch

from aquifer.benchmarks.harness import Run, clocked_fresh
from aquifer.server.engine.graphs import record_graph

log = structlog.get_logger(__name__)


def replayed(
    device: torch.device,
    operations: Sequence[Callable[[], object]],
    *,
    rounds: int = 1,
    prepare: Callable[[], None] | None = None,
) -> Run:
    """A run that times all operations, `rounds` times over, in one graph; it returns the seconds of one.

    The graph is recorded in the first run, after every operation ran once; what cannot be recorded is
    launched in a row. prepare: runs before the operations and is not timed.
    """
    start: Callable[[], None] | None = None
    # What operations return is kept until their next round: otherwise they would all write to one place.
    kept: deque[object] = deque(maxlen=len(operations))

    def launch() -> None:
        for _ in range(rounds):
            for operation in operations:
                kept.append(operation())

    def record() -> Callable[[], None]:
        try:
            graph, _ = record_graph(launch, torch.cuda.graph_pool_handle())
        except RuntimeError as error:
            log.warning("launched in a row, not replayed", operation=repr(operations[0]), error=str(error))
            return launch
        return graph.replay

    def ready() -> Callable[[], None]:
        nonlocal start
        if prepare:
            prepare()
        if start is None:
            start = record()
            if prepare:
                prepare()
        return start

    run = clocked_fresh(device, ready)
    return lambda: run() / (rounds * len(operations))
