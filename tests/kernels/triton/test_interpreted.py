"""Runs this folder under Triton's interpreter, in processes that asked for it before Triton was imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROCESSES = 2
NOT_INTERPRETED = {"test_compiled.py", "test_interpreted.py"}


@pytest.mark.timeout(900)
def test_the_kernels_equal_their_twins_under_the_interpreter() -> None:
    here = Path(__file__).parent
    files = sorted(str(file) for file in here.glob("test_*.py") if file.name not in NOT_INTERPRETED)
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*command, *files[first::PROCESSES]],
            cwd=here.parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for first in range(PROCESSES)
    ]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * PROCESSES, "\n".join(outputs)
