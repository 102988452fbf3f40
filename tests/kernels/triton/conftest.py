"""Where Triton kernels are tested: on a CUDA device if there is one, otherwise under Triton's interpreter.

The interpreter must be asked for before anything imports Triton, and other tests may have imported it. So
without a device only two files are collected here: one runs this folder again in a process of its own under
TRITON_INTERPRET=1, the other compiles every kernel for Hopper, which needs no device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the interpreter is for CPU tensors
    with_kernels = True
else:
    with_kernels = torch.cuda.is_available()

_WITHOUT_KERNELS = {"test_interpreted.py", "test_compiled.py"}
_ALL = {path.name for path in Path(__file__).parent.glob("test_*.py")}
collect_ignore = sorted(_WITHOUT_KERNELS if with_kernels else _ALL - _WITHOUT_KERNELS)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that were launched during the test; at least one must be."""
    from triton.runtime.jit import KernelInterface

    names: list[str] = []
    launch = KernelInterface.__getitem__

    def record(kernel: KernelInterface, grid: object) -> object:
        names.append(kernel.__name__)
        return launch(kernel, grid)

    monkeypatch.setattr(KernelInterface, "__getitem__", record)
    yield names
    assert names, "no Triton kernel was launched"
