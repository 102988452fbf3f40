"""`make demo`: the main job, on this machine, with the bundled model.

Starts the real service, sends a document of about 8,000 tokens cold, asks again warm, asks something
else about it, checks every answer against the known one, and stops the service.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoTokenizer

from aquifer.clients import Answer, Client, Sampling, Token
from aquifer.clients import Progress as Reading
from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.server.settings import REFERENCE_MODEL
from aquifer.workloads.scoring import score_text2json
from aquifer.workloads.tasks import Question, Sample, token_counter
from aquifer.workloads.text2json import make_text2json

DOCUMENT_TOKENS = 8000
ANSWER_TOKENS = 1000
START_SECONDS = 120
LOWEST_SCORE = 0.9
"""Below it an answer counts as wrong. The bundled model itself reaches 0.97 and more on average."""

_SALT = secrets.token_hex(8)
"""Keeps the first question cold where Redis still holds an earlier run's segments."""


def run_demo(seed: int) -> bool:
    """Run it, print what happened; whether all of it held."""
    console = Console()
    sample = _document(seed)
    redis_url = _answering_redis()
    console.print(f"[bold]Aquifer[/] with its bundled model; tiers: RAM{', Redis' if redis_url else ''}")
    with _service(redis_url, console) as (client, process):
        asked = [
            ("cold", sample.questions[0]),
            ("warm, same question", sample.questions[0]),
            ("warm, another question", sample.questions[1]),
        ]
        answers = []
        for label, question in asked:
            answers.append(_ask(client, console, label, sample.document, question))
        process.send_signal(signal.SIGTERM)
        stopped = process.wait(60) == 0
    scores = [score_text2json(a.text, q.answer) for a, (_, q) in zip(answers, asked, strict=True)]
    _report(console, [label for label, _ in asked], answers, scores)
    failures = list(_failures(answers, scores, stopped))
    for failure in failures:
        console.print(f"[red]did not hold:[/] {failure}")
    if not failures:
        faster = answers[0].timings.ttft_seconds / answers[1].timings.ttft_seconds
        console.print(f"[green]all held;[/] the warm answer began {faster:.0f}x sooner than the cold one")
    return not failures


def _document(seed: int) -> Sample:
    return make_text2json(
        seed, DOCUMENT_TOKENS, token_counter(AutoTokenizer.from_pretrained(REFERENCE_MODEL))
    )


def _answering_redis() -> str | None:
    """REDIS_URL, or the usual address, if something answers there."""
    url = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
    try:
        with redis.Redis.from_url(url, socket_connect_timeout=0.5, socket_timeout=0.5) as connection:
            connection.ping()
    except (redis.RedisError, OSError, ValueError):
        return None
    return url


@contextmanager
def _service(redis_url: str | None, console: Console) -> Iterator[tuple[Client, subprocess.Popen[bytes]]]:
    """The real service as its own process, stopped in any case."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AQUIFER_") and k != "REDIS_URL"}
    if redis_url:
        environment["REDIS_URL"] = redis_url
    with tempfile.TemporaryDirectory() as folder:
        port_file = Path(folder) / "port"
        aquifer = Path(sys.executable).with_name("aquifer")
        command = [
            str(aquifer),
            "serve",
            "--port",
            "0",
            "--port-file",
            str(port_file),
            "--log-level",
            "warning",
        ]
        # Without pages kept on the device, the warm answers come from the compressed tiers: that is
        # what is shown here. A salt of its own keeps the first question cold if Redis was used before.
        command += ["--no-gpu-cache", "--load-gate", "always", "--device", "cpu"]
        process = subprocess.Popen(command, env=environment)
        try:
            with console.status("starting the service"):
                deadline = time.monotonic() + START_SECONDS
                while not port_file.exists():
                    if process.poll() is not None:
                        raise SystemExit(f"the service ended with status {process.returncode}")
                    if time.monotonic() > deadline:
                        raise SystemExit(f"the service did not start within {START_SECONDS} s")
                    time.sleep(0.1)
            with Client(f"http://127.0.0.1:{port_file.read_text()}") as client:
                yield client, process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _ask(client: Client, console: Console, label: str, document: str, question: Question) -> Answer:
    """One question, with its progress shown."""
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS)
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"{label}: reading", total=None, note="")
        generated = 0
        for item in client.generate_stream(
            question.inputs, document=document, sampling=sampling, cache_salt=_SALT, progress=True
        ):
            if isinstance(item, Reading):
                bar.update(
                    task, completed=item.done_tokens, total=item.total_tokens, note="tokens of the prompt"
                )
            elif isinstance(item, Token):
                generated += 1
                bar.update(task, description=f"{label}: answering", note=f"{generated} tokens")
            else:
                answer = item
    console.rule(f"{label}: {question.inputs.strip()}", align="left")
    console.print(answer.text.strip(), markup=False, highlight=False, soft_wrap=True)
    return answer


def _report(console: Console, labels: list[str], answers: list[Answer], scores: list[float]) -> None:
    table = Table("", *labels)
    rows = {
        "time to first token": [f"{a.timings.ttft_seconds:.3f} s" for a in answers],
        "prompt tokens": [f"{a.prompt_tokens:,}" for a in answers],
        "  computed": [f"{a.prompt_tokens - a.cached_tokens.total:,}" for a in answers],
        "  restored from RAM": [f"{a.cached_tokens.ram:,}" for a in answers],
        "  restored from Redis": [f"{a.cached_tokens.redis:,}" for a in answers],
        "KV uncompressed": [f"{a.kv.raw_bytes:,} bytes" for a in answers],
        "KV stored": [f"{a.kv.stored_bytes:,} bytes" for a in answers],
        "bits per value": [f"{a.kv.bits_per_value:.3f} ({a.kv.codec})" for a in answers],
        "answer": [f"{a.generated_tokens} tokens in {a.timings.decode_seconds:.1f} s" for a in answers],
        "Text2JSON score": [f"{100 * score:.1f}" for score in scores],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)


def _failures(answers: list[Answer], scores: list[float], stopped: bool) -> Iterator[str]:
    cold, *warm = answers
    if cold.cached_tokens.total:
        yield f"the cold question found {cold.cached_tokens.total} tokens in a cache"
    for answer in warm:
        if answer.prompt_tokens - answer.cached_tokens.total > 2 * SEGMENT_TOKENS:
            yield f"a warm question computed {answer.prompt_tokens - answer.cached_tokens.total} tokens again"
    for score in scores:
        if score < LOWEST_SCORE:
            yield f"an answer scored {100 * score:.1f}"
    if not stopped:
        yield "the service did not stop cleanly"
