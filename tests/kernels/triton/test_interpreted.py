"""Runs this folder under Triton's interpreter, in a process that asked for it before Triton was imported."""

import os
import subprocess
import sys
from pathlib import Path


def test_the_kernels_equal_their_twins_under_the_interpreter() -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=here.parents[2], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
