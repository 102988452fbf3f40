"""`aquifer`: the command line. Heavy imports stay inside the commands, so that --help answers at once."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from aquifer.server.flags import fail, takes_settings
from aquifer.server.settings import Settings

if TYPE_CHECKING:
    from aquifer.server.engine.engine import Engine

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
# Answers and JSON go to stdout, everything else to stderr: both can be redirected.
_stderr = Console(stderr=True)


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
    columns = (TextColumn("reading"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_stderr, transient=True, disable=not _stderr.is_terminal) as bar:
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
                    _stderr.print(
                        f"{piece.prompt_tokens:,} prompt tokens, {piece.cached_tokens:,} of them cached; "
                        f"first token after {piece.ttft_seconds:.2f} s, {piece.generated_tokens} tokens",
                        style="dim",
                    )


@contextmanager
def _engine(settings: Settings, metrics: Any) -> Iterator[Engine]:
    from aquifer.server.engine.build import build_engine

    try:
        with _stderr.status(f"loading {settings.model}"):
            engine = build_engine(settings, metrics)
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
