"""Benchmarks as a user runs them, on a model that is small enough for a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from aquifer.benchmarks import geometries
from aquifer.server.cli import app


@dataclass(frozen=True)
class Outcome:
    """What a command printed. line: its last line, parsed. rows: the figures by name."""

    output: str
    line: dict[str, Any]

    @property
    def rows(self) -> dict[str, dict[str, float]]:
        return {row["name"]: row["figures"] for row in self.line["rows"]}


def _tiny() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
    )


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny checkpoint is written, once."""
    return tmp_path_factory.mktemp("weights")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `tiny` a geometry."""
    monkeypatch.setitem(geometries.GEOMETRIES, "tiny", _tiny)


@pytest.fixture
def bench_once(tiny: None, weights: Path) -> Callable[..., Outcome]:
    """Run `aquifer bench` with these arguments on the tiny geometry."""

    def run(command: str, *arguments: str) -> Outcome:
        flags = ["--geometry", "tiny", "--device", "cpu", "--weights", str(weights)]
        result = CliRunner().invoke(app, ["bench", command, *flags, *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return Outcome(result.output, json.loads(result.stdout.splitlines()[-1]))

    return run


@pytest.fixture
def bench(bench_once: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """The same, with two runs of each contestant."""
    return lambda command, *arguments: bench_once(command, "--repeat", "2", *arguments)
