"""`aquifer`: the command line. Heavy imports stay inside the commands, so that --help answers at once."""

from __future__ import annotations

import asyncio
import json
import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

from aquifer.server.cli_bench import bench
from aquifer.server.cli_eval import eval_app
from aquifer.server.console import progress_bar, stderr
from aquifer.server.flags import fail, takes_settings
from aquifer.server.settings import Settings

if TYPE_CHECKING:
    from aquifer.server.engine.engine import Engine

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.add_typer(bench, name="bench")
app.add_typer(eval_app, name="eval")


def main() -> None:
    app()


@app.command()
@takes_settings
def serve(
    settings: Settings,
    port_file: Annotated[
        Optional[Path], typer.Option(help="write the port here once connections are accepted")  # noqa: UP045
    ] = None,
) -> None:
    """Serve a model over HTTP until SIGTERM."""
    from aquifer.cachestore.records import RecordStore
    from aquifer.server.app import create_app
    from aquifer.server.app import serve as serve_app
    from aquifer.server.engine.build import load_tokenizer
    from aquifer.server.logs import configure_logging
    from aquifer.server.metrics import Metrics
    from aquifer.server.tokenization import Tokenizer

    configure_logging(settings.log_level)
    metrics = Metrics()
    with _engine(settings, metrics) as engine, _redis_link(settings) as link:
        tokenizer = Tokenizer(load_tokenizer(settings), engine.info.max_prompt_tokens)
        serve_app(create_app(engine, tokenizer, RecordStore(link), settings, metrics), settings, port_file)


@app.command()
@takes_settings
def ask(
    settings: Settings,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="the document, UTF-8 text")],
    question: str,
    url: Annotated[Optional[str], typer.Option(help="a running server; default: in this process")] = None,  # noqa: UP045
    api_key: Annotated[Optional[str], typer.Option(help="for --url")] = None,  # noqa: UP045
) -> None:
    """Ask one question about a text file."""
    from aquifer.clients import AquiferError
    from aquifer.server.logs import configure_logging

    configure_logging("warning")
    try:
        document = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        fail(f"{file} is not UTF-8 text: {error}")
    try:
        if url is None:
            _show(_answer_here(settings, document, question))
        else:
            _show(_answer_from(url, api_key, settings, document, question))
    except (AquiferError, ValueError) as error:
        fail(str(error))


@app.command()
@takes_settings
def config(settings: Settings) -> None:
    """Print the settings that flags, environment, file and defaults add up to."""
    from aquifer.server.doctor import hide_password

    shown = settings.model_dump(mode="json")
    shown["api_keys"] = {
        f"key {number}": tenant for number, tenant in enumerate(settings.api_keys.values(), 1)
    }
    if settings.redis_url:
        shown["redis_url"] = hide_password(settings.redis_url)
    typer.echo(json.dumps(shown, indent=2))


@app.command()
@takes_settings
def doctor(
    settings: Settings, as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False
) -> None:
    """Look for GPU, Triton, Redis, model and predictors; say what is missing and how to get it."""
    from aquifer.server.doctor import examine
    from aquifer.server.logs import configure_logging

    # What is down is in the findings; it need not be logged as well.
    configure_logging("error")
    findings = examine(settings)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        marks = {"ok": "[green]ok[/]", "optional": "[yellow]without[/]", "missing": "[red]missing[/]"}
        table = Table("", "", "found", "what to do", box=None)
        for finding in findings:
            table.add_row(marks[finding.status], finding.name, finding.found, finding.advice)
        Console().print(table)
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


@app.command()
@takes_settings
def calibrate(
    settings: Settings,
    out: Annotated[Path, typer.Option(file_okay=False, help="folder the predictors are written to")],
    texts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            exists=True, dir_okay=False, help='JSON Lines: {"text": "..."}; default: generated records'
        ),
    ] = None,
    bits: Annotated[int, typer.Option(min=2, max=4, help="of the codec they are made for")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="to read, all texts together")] = 262_144,
    sequence_tokens: Annotated[int, typer.Option(min=512, help="where a long text is cut")] = 8192,
    offload: Annotated[
        bool, typer.Option(help="keep the KV on disk: for models that fill the device")
    ] = False,
    seed: int = 0,
) -> None:
    """Fit AQUA-KV's predictors for a model on sample texts."""
    from aquifer.compression.predictors import LayerFit
    from aquifer.server.engine.calibrate import CalibrationPlan, calibrate_model
    from aquifer.server.logs import configure_logging

    configure_logging("warning")
    description = f"generated records, seed {seed}" if texts is None else texts.name
    plan = CalibrationPlan(description, bits, tokens, sequence_tokens, seed, offload)
    fits: list[LayerFit] = []
    with progress_bar("reading") as bar:
        task = bar.add_task("reading", total=float(tokens))
        try:
            calibrate_model(
                settings,
                _generated_texts(settings, seed) if texts is None else _texts(texts),
                plan,
                out,
                on_tokens=lambda count: bar.advance(task, count),
                on_layer=fits.append,
            )
        except (ValueError, OSError) as error:
            fail(str(error))
    table = Table("layer", "key error", "value error", "keys explained", "values explained", box=None)
    for fit in fits:
        figures = (fit.key_error, fit.value_error, fit.key_explained, fit.value_explained)
        table.add_row(str(fit.layer), *(f"{figure:.4f}" for figure in figures))
    Console().print(table)


@app.command()
def demo(seed: int = 1) -> None:
    """Show it on the bundled model: one document, read once, asked about cold and warm."""
    from aquifer.workloads.demo import run_demo

    if not run_demo(seed):
        raise typer.Exit(1)


@app.command()
def train_reference(
    out: Annotated[Path, typer.Option(file_okay=False, help="folder for the exported model")],
    seconds: Annotated[float, typer.Option(help="stop after so long; go on with --resume")] = math.inf,
    resume: Annotated[Optional[Path], typer.Option(help="checkpoint file or exported folder")] = None,  # noqa: UP045
    checkpoint: Annotated[Optional[Path], typer.Option(help="where to save the full state")] = None,  # noqa: UP045
) -> None:
    """Train the bundled reference model again. Needs a GPU."""
    from aquifer.workloads.reference import train

    command = shlex.join(["aquifer", *sys.argv[1:]])
    try:
        train.train_reference(out, seconds=seconds, resume=resume, checkpoint=checkpoint, command=command)
    except FileNotFoundError as error:
        fail(str(error))


@dataclass(frozen=True)
class _Summary:
    """What is said below an answer."""

    prompt_tokens: int
    cached_tokens: int
    ttft_seconds: float
    generated_tokens: int


# How much of the prompt is read (0 to 1), text, and the end.
_Pieces = Iterator[float | str | _Summary]


def _answer_from(url: str, api_key: str | None, settings: Settings, document: str, question: str) -> _Pieces:
    from aquifer.clients import Answer, Client, Sampling, Token
    from aquifer.clients import Progress as Reading

    sampling = Sampling(max_new_tokens=settings.max_new_tokens)
    with Client(url, api_key=api_key) as client:
        for item in client.generate_stream(question, document=document, sampling=sampling, progress=True):
            if isinstance(item, Reading):
                yield item.done_tokens / item.total_tokens
            elif isinstance(item, Token):
                yield item.text
            elif isinstance(item, Answer):
                ttft_seconds = item.timings.ttft_seconds
                yield _Summary(
                    item.prompt_tokens, item.cached_tokens.total, ttft_seconds, item.generated_tokens
                )


def _answer_here(settings: Settings, document: str, question: str) -> _Pieces:
    from aquifer.server.engine.build import load_tokenizer
    from aquifer.server.engine.types import (
        Event,
        FailedEvent,
        FinishedEvent,
        GenerateRequest,
        ProgressEvent,
        SamplingParams,
        TokenEvent,
    )
    from aquifer.server.metrics import Metrics
    from aquifer.server.tokenization import Tokenizer

    events: SimpleQueue[Event] = SimpleQueue()
    with _engine(settings, Metrics()) as engine:
        tokenizer = Tokenizer(load_tokenizer(settings), engine.info.max_prompt_tokens)
        token_ids = asyncio.run(tokenizer.prompt(question, document))
        room = engine.info.max_total_tokens - len(token_ids)
        sampling = SamplingParams(max_new_tokens=min(settings.max_new_tokens, room))
        engine.submit(GenerateRequest("ask", token_ids, sampling), events.put)
        while True:
            event = events.get()
            if isinstance(event, ProgressEvent):
                yield event.done_tokens / event.total_tokens
            elif isinstance(event, TokenEvent):
                yield event.text
            elif isinstance(event, FailedEvent):
                raise ValueError(event.message)
            else:
                break
        assert isinstance(event, FinishedEvent)
        yield event.tail
        yield _Summary(
            event.prompt_tokens, event.cached.total, event.timings.ttft_seconds, event.generated_tokens
        )
        # What was read goes to Redis before the process ends, so that the next question is fast.
        engine.flush(60.0)


def _show(pieces: _Pieces) -> None:
    """Progress on stderr until the answer begins, the answer on stdout, a line of figures on stderr."""
    with progress_bar("reading", transient=True) as bar:
        task = bar.add_task("reading", total=1.0)
        for piece in pieces:
            if isinstance(piece, float):
                bar.update(task, completed=piece)
            else:
                bar.stop()
                if isinstance(piece, str):
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                else:
                    typer.echo()
                    stderr.print(
                        f"{piece.prompt_tokens:,} prompt tokens, {piece.cached_tokens:,} of them cached; "
                        f"first token after {piece.ttft_seconds:.2f} s, {piece.generated_tokens} tokens",
                        style="dim",
                    )


def _generated_texts(settings: Settings, seed: int) -> Iterator[str]:
    from aquifer.server.engine.build import load_tokenizer
    from aquifer.workloads.reference.texts import calibration_texts
    from aquifer.workloads.tasks import token_counter

    return calibration_texts(seed, token_counter(load_tokenizer(settings)))


def _texts(file: Path) -> Iterator[str]:
    """The texts of a JSON Lines file. Raises ValueError with the line's number."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield str(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{file}:{number}: not {{"text": "..."}}') from error


@contextmanager
def _engine(settings: Settings, metrics: Any) -> Iterator[Engine]:
    from aquifer.server.engine.build import build_engine

    try:
        with stderr.status(f"loading {settings.model}"):
            engine = build_engine(settings, metrics, warm=True)
    except (ValueError, OSError) as error:
        fail(str(error))
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def _redis_link(settings: Settings) -> Iterator[Any]:
    from aquifer.cachestore.redis_link import RedisLink

    if not settings.redis_url:
        yield None
        return
    link = RedisLink(settings.redis_url, timeout_seconds=settings.redis_timeout_seconds)
    try:
        yield link
    finally:
        link.close()
