"""What several folders share: the device, logging, and a real redis-server for whoever asks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import structlog
from hypothesis import settings
from redis_server import RedisServer, pick_port
from waiting import wait_until

# How long an example takes says more about the machine than about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="where engines run: cpu or cuda; default: cuda where there is one")


def pytest_configure(config: pytest.Config) -> None:
    # Read by tests/support/devices.py when the first test module is imported, after this.
    device = config.getoption("--device")
    if device:
        os.environ["TEST_DEVICE"] = device


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Add up what tests have counted with record_property("counted: ...", number)."""
    sums: Counter[str] = Counter()
    for report in terminalreporter.getreports(""):
        sums.update({name: int(str(value)) for name, value in report.user_properties if "counted" in name})
    for name, count in sorted(sums.items()):
        terminalreporter.write_line(f"{name} {count:,}")


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
