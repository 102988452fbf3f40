"""The rows of `aquifer bench kernels` on CUDA: all of them run, and no kernel is without one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aquifer.benchmarks.device_kernels import GROUPS
from aquifer.benchmarks.device_selection import FOUND_SHARE, found_kernels, selection_kernels
from aquifer.benchmarks.device_shape import Shape
from aquifer.benchmarks.harness import LeftOutError
from aquifer.benchmarks.roofline import Kernel, Limit
from aquifer.compression.spec import KVSpec
from aquifer.kernels.triton import attention, landmarks, row_attention, select

# What numpy says where the interpreter takes the logarithm of an empty block, which is -inf as it should be.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log")

LAUNCH = re.compile(r"^\s+(_\w+)\[(?:\(|grid\])", re.MULTILINE)


@pytest.fixture
def shape(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Shape:
    if device.type == "cpu":  # the interpreter takes them one by one
        for module in (attention, landmarks, row_attention, select):
            monkeypatch.setattr(module, "PROGRAMS", 4)
    return shape_of(device, head_dim=64)


def shape_of(device: torch.device, head_dim: int) -> Shape:
    # The interpreter truncates to bfloat16 where a device rounds.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    spec = KVSpec(num_layers=2, num_kv_heads=2, head_dim=head_dim, dtype=dtype, rope="")
    sizes = {"query_heads": 8, "hidden": 96, "intermediate": 160, "vocabulary": 3000, "tokens": 300}
    return Shape(spec, **sizes, device=device, cold_bytes=0)


def test_every_row_runs_and_every_kernel_is_in_one(shape: Shape, launched: list[str]) -> None:
    measured: set[str] = set()
    names: list[str] = []
    for make in GROUPS.values():
        for kernel in make(shape):
            names.append(kernel.name)
            assert len(kernel.operations) == 2 and kernel.needs[Limit.MEMORY] > 0
            if kernel.prepare:
                kernel.prepare()
            launched.clear()
            kernel.operations[0]()
            assert len(launched) == kernel.needs.get(Limit.START, 0), kernel.name
            measured |= set(launched)
    assert len(set(names)) == len(names)
    sources = Path(attention.__file__).parent.glob("*.py")
    names_of_kernels = {name for source in sources for name in LAUNCH.findall(source.read_text())}
    assert measured == names_of_kernels | {landmarks.SCORE.__name__}


@pytest.mark.parametrize("requests", [1, 3])
@pytest.mark.parametrize(("make", "share"), [(selection_kernels, 0.0), (found_kernels, FOUND_SHARE)])
def test_as_many_rows_are_fetched_as_the_row_says(
    make: Callable[[Shape, int], list[Kernel]], share: float, requests: int, shape: Shape
) -> None:
    find, fetch = [
        kernel for kernel in make(shape, requests) if kernel.name.startswith(("find rows", "fetch rows"))
    ]
    wanted, heads, head_dim = 64, 2, 64
    missing = wanted - round(share * wanted)
    assert fetch.needs[Limit.BUS] == missing * requests * heads * head_dim
    assert find.prepare is not None
    for _ in range(2):
        find.prepare()
        assert [operation().tolist() for operation in find.operations] == [[[missing] * heads] * requests] * 2


def test_rows_of_geometries_without_kernels_are_left_out(device: torch.device) -> None:
    shape = shape_of(device, head_dim=8)
    left_out = set()
    for name, make in GROUPS.items():
        try:
            make(shape)
        except LeftOutError:
            left_out.add(name)
    assert left_out == {
        *("codec", "codec in integers"),
        *("selection", "rows of the trace"),
        *("selection, many requests", "rows of the trace, many requests"),
    }
