"""The commands that measure a GPU are ones that this version takes; they themselves need a GPU."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from typer.testing import CliRunner

from aquifer.server.cli import app

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def run(*sections: str, aquifer: str = "echo") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"AQUIFER": aquifer}
    return subprocess.run([SCRIPT, *sections], env=environment, capture_output=True, text=True, check=False)


def test_every_command_is_one_of_ours() -> None:
    commands = [line for line in run().stdout.splitlines() if line.startswith("bench ")]
    assert len({command.split()[1] for command in commands}) == 8
    for command in commands:
        # Help is given before anything is done, and after names and options are read.
        result = CliRunner().invoke(app, [*shlex.split(command), "--help"])
        assert result.exit_code == 0, (command, result.output)


def test_what_fails_is_named_and_stops_nothing() -> None:
    result = run("store", "redis", aquifer="false")
    assert result.returncode == 1
    assert [line.split()[3] for line in result.stderr.splitlines()] == ["store", "redis"]


def test_an_unknown_section_is_refused_before_anything_runs() -> None:
    result = run("store", "speed")
    assert result.returncode == 2 and not result.stdout and "there are restore store" in result.stderr
