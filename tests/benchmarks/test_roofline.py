"""What limits a kernel, and its share of that; and timing by recorded graphs."""

import pytest
import torch

from aquifer.benchmarks.replay import replayed
from aquifer.benchmarks.roofline import Kernel, Limit, limit_figures

RATES = {Limit.MEMORY: 4e12, Limit.BUS: 5e10, Limit.GEMM: 8e14, Limit.START: 1e6}


@pytest.mark.parametrize(
    ("needs", "limit", "least"),
    [
        ({Limit.MEMORY: 4e9, Limit.START: 1}, Limit.MEMORY, 1e-3),
        ({Limit.MEMORY: 4e9, Limit.GEMM: 1.6e12, Limit.START: 1}, Limit.GEMM, 2e-3),
        ({Limit.MEMORY: 4e6, Limit.BUS: 5e6}, Limit.BUS, 1e-4),
        ({Limit.MEMORY: 4e3, Limit.START: 3}, Limit.START, 3e-6),
    ],
)
def test_the_limit_is_what_would_take_longest(needs: dict[Limit, float], limit: Limit, least: float) -> None:
    kernel = Kernel("one", [lambda: None], needs)
    assert kernel.bound(RATES) is limit
    assert kernel.least_seconds(RATES) == pytest.approx(least)
    assert kernel.figures(4 * least, RATES)["of_limit_percent"] == pytest.approx(25)


def test_rates_are_of_what_a_kernel_needs() -> None:
    kernel = Kernel("one", [lambda: None], {Limit.MEMORY: 2e9, Limit.BUS: 1e9, Limit.START: 1})
    figures = kernel.figures(0.5, RATES)
    assert (figures["gb_per_second"], figures["bus_gb_per_second"]) == (4.0, 2.0)
    assert "gflop_per_second" not in figures


def test_a_limit_shows_its_rate_or_its_time() -> None:
    assert limit_figures(Limit.BUS, 5e10) == {"bus_gb_per_second": 50.0, "of_limit_percent": 100.0}
    assert limit_figures(Limit.START, 1e6) == {"seconds": 1e-6, "of_limit_percent": 100.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are recorded on a CUDA device")
def test_a_replay_runs_every_operation_as_often_as_there_are_rounds() -> None:
    sums = torch.zeros(2, device="cuda")
    prepared = []

    def prepare() -> None:
        prepared.append(sums.tolist())
        sums.zero_()

    operations = [lambda: sums[0].add_(1), lambda: sums[1].add_(2)]
    run = replayed(sums.device, operations, rounds=3, prepare=prepare)
    assert run() > 0 and run() > 0
    assert sums.tolist() == [3, 6]
    assert prepared == [[0, 0], [1, 2], [3, 6]]
