"""Runs this folder under Triton's interpreter, in processes that asked for it before Triton was imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NOT_INTERPRETED = {"test_compiled.py", "test_interpreted.py"}
HALF = {"test_device_streams.py", "test_fused_codec.py", "test_lanes.py", "test_select.py", "test_step.py"}
"""Take about as long as all others together."""


@pytest.mark.timeout(900)
def test_the_kernels_equal_their_twins_under_the_interpreter() -> None:
    here = Path(__file__).parent
    names = {file.name for file in here.glob("test_*.py")} - NOT_INTERPRETED
    assert names > HALF
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*command, *(str(here / name) for name in sorted(part))],
            cwd=here.parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part in (HALF, names - HALF)
    ]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)
