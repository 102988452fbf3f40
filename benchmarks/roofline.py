"""What a kernel needs at least, what the device gives at most, and the share of that which it gets.

Several things limit a kernel: bytes in memory, bytes over the bus, operations, and how fast kernels follow
each other. The limit of a kernel is the one that would take longest for what the kernel needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch

from aquifer.benchmarks.geometries import Subject
from aquifer.benchmarks.harness import clocked
from aquifer.benchmarks.limits import measure_limits, typical_seconds
from aquifer.benchmarks.replay import replayed

_COPIED_BYTES = 1 << 30
_GEMM_SIZE = 8192
_STARTS = 512


class Limit(Enum):
    """What a kernel may be bound by, by the name that its row has."""

    MEMORY = "copy in memory"
    """Bytes read and written."""
    BUS = "copy from host memory"
    """Bytes from page-locked host memory."""
    GEMM = "large GEMM"
    """Multiplications and additions in the model's dtype."""
    GEMM_8 = "large GEMM in 8 bits"
    """Multiplications and additions of int8. The limit is a product of 8-bit floats: matrix units multiply
    both at the same rate, and torch's product of integers is slower than one in 16 bits."""
    START = "start of a kernel"
    """Launches, of kernels that do nothing, within a recorded graph."""


FIGURES = {
    Limit.MEMORY: "gb_per_second",
    Limit.BUS: "bus_gb_per_second",
    Limit.GEMM: "gflop_per_second",
    Limit.GEMM_8: "gflop_per_second",
}
"""Under which name a rate is shown, in 1e9 per second."""

Needs = Mapping[Limit, float]
"""How much of each a kernel needs at least."""

Rates = Mapping[Limit, float]
"""How much of each there is per second."""


@dataclass(frozen=True)
class Kernel:
    """operations: the same work over different data, one after the other, so that none finds its data in a
    cache. needs: of one of them. prepare: puts back what they change; it runs before them and is not timed.
    note: what a reader has to know of its limit."""

    name: str
    operations: Sequence[Callable[[], object]]
    needs: Needs
    prepare: Callable[[], None] | None = None
    note: str | None = None

    def least_seconds(self, rates: Rates) -> float:
        return self.needs[self.bound(rates)] / rates[self.bound(rates)]

    def bound(self, rates: Rates) -> Limit:
        """What limits it."""
        return max(self.needs, key=lambda limit: self.needs[limit] / rates[limit])

    def figures(self, seconds: float, rates: Rates) -> dict[str, float]:
        """Of one operation that took so long."""
        done = {FIGURES[limit]: self.needs[limit] / seconds / 1e9 for limit in FIGURES if limit in self.needs}
        return done | {"of_limit_percent": 100 * self.least_seconds(rates) / seconds}


def limit_figures(limit: Limit, rate: float) -> dict[str, float]:
    """What a limit's own row shows."""
    shown = {FIGURES[limit]: rate / 1e9} if limit in FIGURES else {"seconds": 1 / rate}
    return shown | {"of_limit_percent": 100.0}


def measure_rates(subject: Subject) -> dict[Limit, float]:
    """Of the subject's device; the bus, 8 bits and starts only on CUDA. 8 bits only where matrix units know
    8-bit floats."""
    limits = measure_limits(subject)
    rates = {Limit.MEMORY: limits.bytes_per_second, Limit.GEMM: limits.flop_per_second}
    if subject.device.type == "cuda":
        rates |= _cuda_rates(subject.device)
    return rates


def _cuda_rates(device: torch.device) -> dict[Limit, float]:
    host = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=device)
    nothing = torch.zeros(1, device=device)
    rates = {
        Limit.BUS: _COPIED_BYTES
        / typical_seconds(clocked(device, lambda: target.copy_(host, non_blocking=True))),
        Limit.START: 1 / typical_seconds(replayed(device, [partial(nothing.add_, 1)], rounds=_STARTS)),
    }
    if torch.cuda.get_device_capability(device) >= (8, 9):
        left, right = (
            torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device).to(torch.float8_e4m3fn) for _ in range(2)
        )
        one = torch.ones((), device=device)

        def multiply() -> torch.Tensor:
            return torch._scaled_mm(left, right.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        rates[Limit.GEMM_8] = 2 * _GEMM_SIZE**3 / typical_seconds(clocked(device, multiply))
    return rates
