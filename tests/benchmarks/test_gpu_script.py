"""The commands that measure a GPU are ones that this version takes; they themselves need a GPU."""

from __future__ import annotations

import os
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aquifer.benchmarks.geometries import GEOMETRIES
from aquifer.benchmarks.peers import PEERS
from aquifer.server import cli_bench
from aquifer.server.cli import app

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def run(*sections: str, aquifer: str = "echo") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"AQUIFER": aquifer}
    return subprocess.run([SCRIPT, *sections], env=environment, capture_output=True, text=True, check=False)


def test_every_command_is_one_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[object] = []
    monkeypatch.setattr(cli_bench, "_subject", lambda geometry, *_: GEOMETRIES[geometry])
    monkeypatch.setattr(cli_bench, "_run", lambda measure, json_file: measured.append(measure))
    commands = [shlex.split(line) for line in run().stdout.splitlines() if line.startswith("bench ")]
    assert len({command[1] for command in commands}) == 8
    for command in commands:
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, (command, result.output)
        peers = [value for option, value in pairwise(command) if option == "--peer"]
        assert set(peers) <= set(PEERS)
    assert len(measured) == len(commands)


def test_what_fails_is_named_and_stops_nothing() -> None:
    result = run("store", "redis", aquifer="false")
    assert result.returncode == 1
    assert [line.split()[3] for line in result.stderr.splitlines()] == ["store", "redis"]


def test_an_unknown_section_is_refused_before_anything_runs() -> None:
    for sections in (["store", "speed"], ["store redis"]):
        result = run(*sections)
        assert result.returncode == 2 and not result.stdout and "there are restore store" in result.stderr
