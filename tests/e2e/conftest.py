"""Services in processes of their own, over one tiny checkpoint on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from devices import DEVICE
from redis_server import RedisServer
from service_process import ServiceProcess, readable_model
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

# Small, exact, and the same on every machine: answers can be compared with plain `generate`, whatever
# tier they came from. Without the device's own cache every repeated document goes through the tiers.
EXACT = {
    "device": str(DEVICE),
    "dtype": "float32",
    "threads": 1,
    "codec": "raw",
    "load_gate": "always",
    "gpu_cache": False,
    "gpu_kv_bytes": 32 << 20,
    "ram_bytes": 64 << 20,
    "redis_timeout_seconds": 1.0,
}
PAGE_BYTES = 3 * 2 * 256 * 32 * 4
"""KV of one segment: layers, keys and values, tokens, channels, bytes of a float32."""

StartService = Callable[..., ServiceProcess]


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    """The model under test, in this process, to compare with."""
    return readable_model()


@pytest.fixture(scope="session")
def checkpoint(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model under test, on disk."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start_service(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartService]:
    """Start services, with settings of their own beside EXACT's; all must end well with the module."""
    services: list[ServiceProcess] = []

    def start(**settings: Any) -> ServiceProcess:
        folder = tmp_path_factory.mktemp("service")
        services.append(ServiceProcess(folder, **{"model": checkpoint, **EXACT, **settings}))
        return services[-1]

    yield start
    for service in services:
        service.stop()


@pytest.fixture(scope="session")
def plain_service(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One service without Redis for all tests that leave it as they found it. It has room for few
    requests at once, in pages and in number, so that others have to wait."""
    few = {"max_running_requests": 4, "gpu_kv_bytes": 40 * PAGE_BYTES}
    service = ServiceProcess(tmp_path_factory.mktemp("service"), model=checkpoint, **{**EXACT, **few})
    yield service
    service.stop()


@pytest.fixture(scope="module")
def module_redis() -> Iterator[RedisServer]:
    """One redis-server for the tests of a module; what they do to it they undo."""
    server = RedisServer()
    yield server
    server.remove()
