"""What `serve` does to the process it runs in."""

import gc
import signal
from typing import Any

import pytest
from fastapi import FastAPI

from aquifer.server import app
from aquifer.server.settings import load_settings


def test_what_is_loaded_is_not_searched_for_garbage_while_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[int] = []
    monkeypatch.setattr(app._AnnouncingServer, "run", lambda _: frozen.append(gc.get_freeze_count()))
    before: Any = signal.getsignal(signal.SIGTERM)
    try:
        app.serve(FastAPI(), load_settings(port=0))
    finally:
        gc.unfreeze()
    assert frozen[0] > 10_000
    assert signal.getsignal(signal.SIGTERM) is before
