"""Engines over tiny random checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tiny_models import build

from aquifer.server.engine.engine import Engine


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """`build`, closing what it built."""
    engines: list[Engine] = []

    def make(*args: Any, **options: Any) -> Engine:
        engines.append(build(*args, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
