"""Waiting for what happens on other threads and in other processes."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], *, seconds: float = 20, poll_seconds: float = 0.005) -> None:
    """Wait until a condition holds; fail if that takes unreasonably long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {seconds:.0f} seconds"
        time.sleep(poll_seconds)
