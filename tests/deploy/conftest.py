from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from aquifer.server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PASSWORDS = {"REDIS_PASSWORD": "s3cret", "GRAFANA_ADMIN_PASSWORD": "s3cret"}
VARIABLE = re.compile(r"\$\{(?P<name>\w+):(?P<kind>[-?])(?P<rest>[^}]*)\}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    """Wait until `url` answers 200; fails with the process's log when it ends or takes longer."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    pytest.fail(f"{url} did not come up (exit status {process.poll()}):\n{log.read_text()[-4000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def known_variables() -> set[str]:
    """Names of the environment variables that the service's settings read."""
    return {f"AQUIFER_{name.upper()}" for name in Settings.model_fields}


@pytest.fixture(scope="session")
def compose() -> dict[str, Any]:
    """docker-compose.yml as Compose reads it, with both passwords set and every other default."""

    def value(match: re.Match[str]) -> str:
        return PASSWORDS[match["name"]] if match["kind"] == "?" else match["rest"]

    return yaml.safe_load(VARIABLE.sub(value, (ROOT / "docker-compose.yml").read_text()))


@pytest.fixture(scope="session")
def redis_url(compose: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real redis-server running the configuration that the compose file mounts."""
    folder = tmp_path_factory.mktemp("redis")
    config = folder / "redis.conf"
    config.write_text(compose["configs"]["redis.conf"]["content"])
    mounted = compose["services"]["redis"]["configs"][0]["target"]
    command = [str(config) if word == mounted else word for word in compose["services"]["redis"]["command"]]
    log, port = folder / "log", free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--bind", "127.0.0.1"], cwd=folder, stdout=output, stderr=output
        )
    deadline = time.monotonic() + 20
    while "Ready to accept connections" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"redis-server did not start:\n{log.read_text()}")
        time.sleep(0.05)
    yield f"redis://:{PASSWORDS['REDIS_PASSWORD']}@127.0.0.1:{port}/0"
    stop(process)


@pytest.fixture(scope="session")
def service(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real `aquifer serve` with the bundled model and the Redis tier, that has served nothing."""
    folder = tmp_path_factory.mktemp("service")
    log, port = folder / "log", free_port()
    environment = {
        **os.environ,
        "AQUIFER_PORT": str(port),
        "AQUIFER_REDIS_URL": redis_url,
        "AQUIFER_RAM_BYTES": str(256 << 20),
        "AQUIFER_THREADS": "1",
        # A warm request reads the RAM tier, whatever recomputing would cost here.
        "AQUIFER_GPU_CACHE": "false",
        "AQUIFER_LOAD_GATE": "always",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("aquifer"), "serve"],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/ready", process, log, seconds=240)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


@pytest.fixture(scope="session")
def prometheus(service: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real Prometheus under the mounted configuration; only the target is the test's own."""
    folder = tmp_path_factory.mktemp("prometheus")
    mounted = ROOT / "deploy" / "prometheus"
    config = yaml.safe_load((mounted / "prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    del scrape["dns_sd_configs"]
    scrape["static_configs"] = [{"targets": [service.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    for name in config["rule_files"]:
        (folder / name).write_bytes((mounted / name).read_bytes())
    log, port = folder / "log", free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=output,
            stderr=output,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/-/ready", process, log, seconds=60)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)
