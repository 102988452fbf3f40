"""Fixtures that several folders share: logging, and a real redis-server for each test that asks for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import structlog
from redis_server import RedisServer, pick_port
from waiting import wait_until


@pytest.fixture(autouse=True)
def logging_of_its_own() -> Iterator[None]:
    """Commands run in a test configure logging for their process, which is everybody's here."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Pick a TCP port on the loopback address that nobody listens on."""
    return pick_port


@pytest.fixture(name="wait_until")
def wait_until_fixture() -> Callable[[Callable[[], bool]], None]:
    """Wait until a condition holds; fail if that takes unreasonably long."""
    return wait_until


@pytest.fixture
def start_redis() -> Iterator[Callable[..., RedisServer]]:
    """Start redis-servers with extra arguments; all of them end with the test."""
    servers: list[RedisServer] = []

    def start(*arguments: str) -> RedisServer:
        servers.append(RedisServer(*arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.remove()


@pytest.fixture
def redis_server(start_redis: Callable[..., RedisServer]) -> RedisServer:
    """One empty redis-server: .url, .port, .socket, .pid, .stop(), .start(), .pause(), .resume()."""
    return start_redis()
