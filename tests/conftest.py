"""Fixtures that several folders share: a real redis-server for each test that asks for one."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def _pick_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RedisServer:
    """A redis-server process on its own port and unix socket, without persistence."""

    def __init__(self, *arguments: str) -> None:
        executable = shutil.which("redis-server")
        assert executable, "these tests need redis-server (Debian, Ubuntu: apt-get install redis-server)"
        # Not pytest's tmp_path: a unix socket's path has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="redis-"))
        self.port = _pick_port()
        self.socket = self.folder / "redis.sock"
        self._command = [executable, "--save", "", "--appendonly", "no", "--bind", "127.0.0.1"]
        self._command += ["--port", str(self.port), "--unixsocket", str(self.socket)]
        self._command += ["--dir", str(self.folder), *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start, or start again on the same port, with nothing stored."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not self._accepts():
            assert self._process.poll() is None, f"redis-server ended with {self._process.returncode}"
            assert time.monotonic() < deadline, "redis-server did not come up"
            time.sleep(0.01)

    def stop(self) -> None:
        """Kill it, as a crash would; connections break."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Stop answering, with connections open."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Pick a TCP port on the loopback address that nobody listens on."""
    return _pick_port


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Wait until a condition holds; fail if that takes unreasonably long."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "did not happen within 20 seconds"
            time.sleep(0.005)

    return wait


@pytest.fixture
def start_redis() -> Iterator[Callable[..., RedisServer]]:
    """Start redis-servers with extra arguments; all of them end with the test."""
    servers: list[RedisServer] = []

    def start(*arguments: str) -> RedisServer:
        servers.append(RedisServer(*arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
        shutil.rmtree(server.folder, ignore_errors=True)


@pytest.fixture
def redis_server(start_redis: Callable[..., RedisServer]) -> RedisServer:
    """One empty redis-server: .url, .port, .socket, .pid, .stop(), .start(), .pause(), .resume()."""
    return start_redis()
