"""`aquifer bench kernels`: each kernel alone, against what this device can do.

A kernel's percent of the limit is the time that its limit (roofline.py) would take over its own. On CUDA
these are the Triton kernels, over data larger than the caches and within recorded graphs; elsewhere the plain
operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from aquifer.benchmarks.geometries import Subject
from aquifer.benchmarks.harness import Contestant, LeftOutError, Report, Row, Run, clocked
from aquifer.benchmarks.plain_kernels import plain_kernels
from aquifer.benchmarks.replay import replayed
from aquifer.benchmarks.roofline import Kernel, Limit, Rates, limit_figures, measure_rates
from aquifer.benchmarks.transfer import new_report

GRAPH_SECONDS = 1e-3
"""What a graph takes at least, if its kernels reach their limits: long beside the start of a graph."""

MOST_OPERATIONS = 512
"""Of a graph."""


def bench_kernels(subject: Subject, tokens: int, repeat: int) -> Report:
    """Every kernel on `tokens` tokens of one layer."""
    report = new_report("kernels", subject, tokens=tokens, repeat=repeat)
    rates = measure_rates(subject)
    bounds: dict[str, Limit] = {}
    for name, make in _groups(subject, tokens):
        try:
            bounds |= _measure(report, make(), subject.device, rates, repeat)
        except LeftOutError as error:
            report.left_out[name] = str(error)
    for limit, rate in rates.items():
        names = [name for name, bound in bounds.items() if bound is limit]
        report.notes += [f"{limit.value} is the limit of: {'; '.join(names)}"] if names else []
        report.rows.append(Row(limit.value, "limit", limit_figures(limit, rate)))
    return report


def _measure(
    report: Report, kernels: Sequence[Kernel], device: torch.device, rates: Rates, repeat: int
) -> dict[str, Limit]:
    """Add rows for some kernels. Returns by name what limits them."""
    contestants = [Contestant(kernel.name, "ours", _run(kernel, device, rates)) for kernel in kernels]
    rows = report.measure(contestants, repeat)
    for kernel in kernels:
        figures = rows[kernel.name].figures
        figures |= kernel.figures(figures["seconds"], rates)
        report.notes += [f"{kernel.name}: {kernel.note}"] if kernel.note else []
    return {kernel.name: kernel.bound(rates) for kernel in kernels}


def _groups(subject: Subject, tokens: int) -> Iterator[tuple[str, Callable[[], Sequence[Kernel]]]]:
    """Kernels whose data is on the device at the same time, by name. To make them may raise LeftOutError."""
    if subject.device.type != "cuda":
        yield "plain operations", partial(plain_kernels, subject, tokens)
        return
    from aquifer.benchmarks.device_kernels import GROUPS, Shape  # Triton is optional

    shape = Shape.of(subject, tokens)
    for name, make in GROUPS.items():
        yield name, partial(make, shape)
        torch.cuda.empty_cache()


def _run(kernel: Kernel, device: torch.device, rates: Rates) -> Run:
    if device.type != "cuda":
        (operation,) = kernel.operations
        return clocked(device, operation)
    each = len(kernel.operations)
    rounds = math.ceil(GRAPH_SECONDS / (each * kernel.least_seconds(rates)))
    # What has to be put back after a round has one.
    rounds = 1 if kernel.prepare else max(1, min(rounds, MOST_OPERATIONS // each))
    return replayed(device, kernel.operations, rounds=rounds, prepare=kernel.prepare)
