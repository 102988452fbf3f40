"""`aquifer bench`: speed on this machine, side by side with peers. See benchmarks/README.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional, cast, get_args

import typer

from aquifer.server.flags import fail

if TYPE_CHECKING:
    from aquifer.benchmarks.generation import Decoding
    from aquifer.benchmarks.geometries import Subject
    from aquifer.benchmarks.harness import Report
    from aquifer.benchmarks.selection import RowsKind
    from aquifer.server.engine.types import KVMode

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
Codec = Annotated[str, typer.Option(help="raw, higgs:BITS, aqua:BITS or aqua:BITS:int8")]
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
NewTokens = Annotated[int, typer.Option(min=2, help="steps of each run")]
Modes = Annotated[
    list[str],
    typer.Option("--mode", help="resident, streamed, selective or verified; may be repeated"),
]
Budget = Annotated[Optional[float], typer.Option(help="share of the context that selective attention reads")]
Rows = Annotated[
    list[str],
    typer.Option(
        "--rows",
        help="chosen rows, in modes selective and verified: own (of random KV), misses (none is on the "
        "device) or trace (as many are as recorded from the bundled model); may be repeated",
    ),
]
Accept = Annotated[
    Optional[float],
    typer.Option(
        min=0, max=1, help="share of the drafts that mode verified accepts; default: the model's own"
    ),
]
DeviceBytes = Annotated[
    Optional[int], typer.Option(min=1, help="device memory for KV; default: as much as the contexts need")
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
    requests: Annotated[int, typer.Option(min=1, help="prompts restored at once; times are per prompt")] = 1,
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
    _run(lambda: bench_restore(subject, codec, tokens, repeat, peer, redis_url, requests), json_file)


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


@bench.command()
def prefill(
    geometry: Geometry = "reference",
    layers: Layers = None,
    tokens: Tokens = 8192,
    repeat: Repeat = 3,
    device: Device = "auto",
    peer: Peers = ["hf-dynamic"],  # noqa: B006
    weights: Weights = None,
    json_file: JsonFile = None,
) -> None:
    """Reading a prompt for the first time."""
    from aquifer.benchmarks.generation import bench_prefill

    subject = _subject(geometry, layers, device, weights)
    _run(lambda: bench_prefill(subject, tokens, repeat, peer), json_file)


@bench.command()
def decode(
    geometry: Geometry = "reference",
    layers: Layers = None,
    codec: Codec = "aqua:2",
    tokens: Tokens = 8192,
    batch: Annotated[int, typer.Option(min=1, help="sequences that decode together")] = 1,
    new_tokens: NewTokens = 32,
    mode: Modes = ["resident"],  # noqa: B006
    budget: Budget = None,
    rows: Rows = ["own"],  # noqa: B006
    accept: Accept = None,
    gpu_kv_bytes: DeviceBytes = None,
    repeat: Repeat = 5,
    device: Device = "auto",
    peer: Peers = ["hf-dynamic"],  # noqa: B006
    weights: Weights = None,
    json_file: JsonFile = None,
) -> None:
    """One step behind a long context, by mode."""
    from aquifer.benchmarks.engines import Needs
    from aquifer.benchmarks.generation import bench_decode

    decoding = _decoding(mode, budget, rows, accept)
    subject = _subject(geometry, layers, device, weights)
    needs = Needs(codec, tokens, batch, new_tokens, device_bytes=gpu_kv_bytes, indexed=decoding.selects)
    _run(lambda: bench_decode(subject, needs, decoding, repeat, peer), json_file)


@bench.command()
def throughput(
    geometry: Geometry = "reference",
    layers: Layers = None,
    codec: Codec = "aqua:2",
    tokens: Tokens = 8192,
    contexts: Annotated[
        str, typer.Option(help="numbers of contexts, ascending, with commas between")
    ] = "1,2,4,8",
    new_tokens: NewTokens = 32,
    mode: Modes = ["resident"],  # noqa: B006
    budget: Budget = None,
    rows: Rows = ["own"],  # noqa: B006
    accept: Accept = None,
    gpu_kv_bytes: DeviceBytes = None,
    repeat: Repeat = 3,
    device: Device = "auto",
    weights: Weights = None,
    json_file: JsonFile = None,
) -> None:
    """Tokens per second against the number of contexts answered at once, until memory is full."""
    from aquifer.benchmarks.engines import Needs
    from aquifer.benchmarks.generation import bench_throughput

    try:
        counts = sorted({int(count) for count in contexts.split(",")})
    except ValueError:
        fail(f"--contexts takes numbers with commas between, not {contexts!r}")
    if counts[0] < 1:
        fail("--contexts begins with at least 1")
    decoding = _decoding(mode, budget, rows, accept)
    subject = _subject(geometry, layers, device, weights)
    needs = Needs(codec, tokens, counts[-1], new_tokens, device_bytes=gpu_kv_bytes, indexed=decoding.selects)
    _run(lambda: bench_throughput(subject, needs, decoding, repeat, counts), json_file)


@bench.command()
def longdoc(
    geometry: Geometry = "reference",
    layers: Layers = None,
    codec: Codec = "aqua:2",
    documents: Annotated[int, typer.Option(min=1)] = 8,
    tokens: Annotated[int, typer.Option(min=256, help="of each document")] = 20_000,
    new_tokens: NewTokens = 100,
    in_flight: Annotated[int, typer.Option(min=1, help="questions out at the same time")] = 2,
    path: Annotated[
        list[str], typer.Option(help="may be repeated; default: all. See benchmarks/longdoc.py")
    ] = [],  # noqa: B006
    device: Device = "auto",
    redis_url: RedisUrl = None,
    weights: Weights = None,
    json_file: JsonFile = None,
) -> None:
    """Several long documents, each asked about twice: where the KV waits decides what the second costs."""
    from aquifer.benchmarks.longdoc import PATHS, LongDocs, PathName, bench_longdoc

    for name in path:
        if name not in PATHS:
            fail(f"no path {name!r}; there are {', '.join(PATHS)}")
    paths = cast("list[PathName]", path) or PATHS
    subject = _subject(geometry, layers, device, weights)
    work = LongDocs(documents, tokens, new_tokens, in_flight)
    _run(lambda: bench_longdoc(subject, work, codec, paths, redis_url), json_file)


@bench.command("redis")
def redis_speed(
    geometry: Geometry = "reference",
    layers: Layers = None,
    codec: Codec = "aqua:2",
    tokens: Tokens = 8192,
    repeat: Repeat = 5,
    device: Device = "auto",
    redis_url: RedisUrl = None,
    weights: Weights = None,
    json_file: JsonFile = None,
) -> None:
    """Records to Redis and back, against plain redis-py, and on to KV that is ready."""
    from aquifer.benchmarks.redis_speed import bench_redis

    subject = _subject(geometry, layers, device, weights)
    _run(lambda: bench_redis(subject, codec, tokens, repeat, redis_url), json_file)


@bench.command()
def kernels(
    geometry: Geometry = "reference",
    layers: Layers = None,
    tokens: Tokens = 8192,
    repeat: Repeat = 20,
    device: Device = "auto",
    weights: Weights = None,
    json_file: JsonFile = None,
) -> None:
    """Every kernel alone, as a share of what this device can do."""
    from aquifer.benchmarks.kernel_speed import bench_kernels

    subject = _subject(geometry, layers, device, weights)
    _run(lambda: bench_kernels(subject, tokens, repeat), json_file)


@bench.command("record-selection")
def record_selection(
    out: Annotated[Path, typer.Option(dir_okay=False, help="the trace, NPZ")],
    tokens: Annotated[int, typer.Option(min=2048, help="of the prompt")] = 8192,
    count: Annotated[int, typer.Option(min=1, help="tokens chosen per step, layer and head")] = 256,
    seed: Annotated[int, typer.Option(help="of the question")] = 1,
) -> None:
    """Write down which selected rows the bundled model finds on the device while it answers Text2JSON."""
    from aquifer.benchmarks.selection import record
    from aquifer.server.engine.build import load_tokenizer
    from aquifer.server.settings import load_settings
    from aquifer.workloads.evaluation import EvalPlan, answer_room, load_items

    settings = load_settings(model="reference", codec="raw", selective_sets="head")
    plan = EvalPlan("text2json", "full", tokens, 1, seed)
    (item,) = load_items(plan, load_tokenizer(settings), settings)
    trace = record(settings, item.prompt, answer_room(item), count)
    trace.save(out)
    some, every = (100 * hits.mean() for hits in trace.hits)
    found = f"{some:.1f} % of the rows found, {every:.1f} if all are kept"
    typer.echo(f"{trace.hits.shape[1]:,} steps, {found}; {trace.about}")


@bench.command()
def plot(
    lines: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="written with --json")],
    out: Annotated[Path, typer.Option(dir_okay=False, help="the picture, PNG")],
) -> None:
    """Draw the JSON lines of benchmarks."""
    from aquifer.benchmarks import plots

    try:
        plots.plot(lines, out)
    except (ValueError, ImportError) as error:
        fail(str(error))


def _modes(names: list[str]) -> list[KVMode]:
    from aquifer.server.engine.types import KVMode

    for name in names:
        if name not in get_args(KVMode):
            fail(f"no mode {name!r}; there are {', '.join(get_args(KVMode))}")
    return cast("list[KVMode]", names)


def _rows(names: list[str]) -> list[RowsKind]:
    from aquifer.benchmarks.selection import RowsKind

    for name in names:
        if name not in get_args(RowsKind):
            fail(f"no rows {name!r}; there are {', '.join(get_args(RowsKind))}")
    return cast("list[RowsKind]", names)


def _decoding(modes: list[str], budget: float | None, rows: list[str], accept: float | None) -> Decoding:
    from aquifer.benchmarks.generation import Decoding

    try:
        return Decoding(_modes(modes), budget, _rows(rows), accept)
    except ValueError as error:
        fail(str(error))


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
