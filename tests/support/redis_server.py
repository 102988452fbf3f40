"""A real redis-server that a test can start, stop, and stall."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path


def pick_port() -> int:
    """A TCP port on the loopback address that nobody listens on."""
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
        self.port = pick_port()
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

    def remove(self) -> None:
        """End it for good, and take its folder away."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def pause(self) -> None:
        """Stop answering, with connections open."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0
