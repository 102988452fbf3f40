"""`aquifer bench`: speed on this machine, side by side with peers. See benchmarks/README.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from aquifer.server.flags import fail

if TYPE_CHECKING:
    from aquifer.benchmarks.geometries import Subject
    from aquifer.benchmarks.harness import Report

bench = typer.Typer(no_args_is_help=True, help="Measure speed, side by side with peers.")

# ruff: noqa: UP045  (typer cannot read `X | None` inside Annotated)
Geometry = Annotated[
    str, typer.Option(help="reference (the bundled model), llama-3.1-8b, llama-3.2-3b or qwen3-8b")
]
Layers = Annotated[
    Optional[int], typer.Option(min=1, help="cut a random model to so many layers, to fit a small machine")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Weights = Annotated[
    Optional[Path], typer.Option(file_okay=False, help="folder where random checkpoints are kept")
]
Codec = Annotated[str, typer.Option(help="raw, higgs:B or aqua:B")]
Tokens = Annotated[int, typer.Option(min=1, help="of the prompt")]
Repeat = Annotated[int, typer.Option(min=1, help="runs of each contestant, one to warm up not counted")]
Peers = Annotated[
    list[str],
    typer.Option(
        "--peer", help="hf-dynamic, hf-offloaded, hf-quanto, hf-static-graph or raw-copy; may be repeated"
    ),
]
JsonFile = Annotated[
    Optional[Path], typer.Option("--json", dir_okay=False, help="append the last line to this file too")
]
RedisUrl = Annotated[
    Optional[str], typer.Option(envvar="REDIS_URL", help="default: a redis-server of its own, if installed")
]


@bench.command()
def restore(
    geometry: Geometry = "reference",
    layers: Layers = None,
    codec: Codec = "aqua:2",
    tokens: Tokens = 8192,
    repeat: Repeat = 5,
    device: Device = "auto",
    peer: Peers = ["hf-dynamic", "raw-copy"],  # noqa: B006  (typer copies it)
    redis_url: RedisUrl = None,
    weights: Weights = None,
    json_file: JsonFile = None,
) -> None:
    """From stored bytes in RAM or Redis to KV that is ready, against reading the prompt again."""
    from aquifer.benchmarks.transfer import bench_restore

    subject = _subject(geometry, layers, device, weights)
    _run(lambda: bench_restore(subject, codec, tokens, repeat, peer, redis_url), json_file)


@bench.command()
def store(
    geometry: Geometry = "reference",
    layers: Layers = None,
    codec: Codec = "aqua:2",
    tokens: Tokens = 8192,
    repeat: Repeat = 5,
    device: Device = "auto",
    peer: Peers = ["raw-copy"],  # noqa: B006
    weights: Weights = None,
    json_file: JsonFile = None,
) -> None:
    """What storing adds to reading a prompt."""
    from aquifer.benchmarks.transfer import bench_store

    subject = _subject(geometry, layers, device, weights)
    _run(lambda: bench_store(subject, codec, tokens, repeat, peer), json_file)


def _subject(geometry: str, layers: int | None, device: str, weights: Path | None) -> Subject:
    import torch

    from aquifer.benchmarks.engines import default_weights_folder
    from aquifer.benchmarks.geometries import make_subject
    from aquifer.server.logs import configure_logging

    configure_logging("error")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return make_subject(geometry, layers, torch.device(device), weights or default_weights_folder())
    except (ValueError, RuntimeError) as error:
        fail(str(error))


def _run(measure: Callable[[], Report], json_file: Path | None) -> None:
    from aquifer.benchmarks.harness import LeftOutError, show

    try:
        report = measure()
    except (ValueError, LeftOutError) as error:
        fail(str(error))
    show(report, json_file)
