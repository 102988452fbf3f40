"""Engines and Redis servers for measurements, and the few things that are asked of them."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import perf_counter

import redis
import torch

from aquifer.benchmarks.geometries import Subject
from aquifer.benchmarks.harness import LeftOutError
from aquifer.cachestore.keys import chain_keys, make_namespace
from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.server.engine.build import build_engine
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.types import FinishedEvent, GenerateRequest, KVMode, SamplingParams
from aquifer.server.metrics import Metrics
from aquifer.server.settings import MIB, load_settings

FLUSH_SECONDS = 600.0

_FIRST_ID = 3
"""Below it lie the bundled model's special tokens."""

_request_numbers = count()


@dataclass(frozen=True)
class Needs:
    """What one measurement asks of an engine.

    codec: as in the settings. contexts, tokens: how many prompts of which length exist at once.
    new_tokens: the longest answer. on_device: prompts stay on the device after their request; otherwise
    every request finds them in the tiers below, or nowhere. device_bytes: room for KV on the device;
    None: as much as the contexts need.
    """

    codec: str
    tokens: int
    contexts: int = 1
    new_tokens: int = 0
    on_device: bool = False
    redis_url: str | None = None
    device_bytes: int | None = None


@contextmanager
def engine_for(subject: Subject, needs: Needs) -> Iterator[Engine]:
    """An engine with just the memory that a measurement needs, so that a large one fits a small machine."""
    raw_bytes = subject.spec.bytes_per_token * (needs.tokens + 2 * SEGMENT_TOKENS) * needs.contexts
    answers = subject.spec.bytes_per_token * needs.contexts * (needs.new_tokens + SEGMENT_TOKENS)
    stored_share = 1.0 if needs.codec == "raw" else 0.4
    settings = load_settings(
        model=str(subject.folder),
        device=str(subject.device),
        codec=needs.codec,
        gpu_cache=needs.on_device,
        gpu_kv_bytes=needs.device_bytes or raw_bytes + answers,
        ram_bytes=int(1.1 * stored_share * raw_bytes) + 16 * MIB,
        redis_url=needs.redis_url or "",
        max_prompt_tokens=needs.tokens + SEGMENT_TOKENS,
        max_running_requests=max(16, needs.contexts),
        load_gate="always",
    )
    engine = build_engine(settings, Metrics())
    try:
        yield engine
    finally:
        engine.close()


def random_prompt(subject: Subject, tokens: int) -> tuple[int, ...]:
    """Fresh random token ids."""
    return tuple(torch.randint(_FIRST_ID, subject.config.vocab_size, (tokens,)).tolist())


def request(
    token_ids: Sequence[int], new_tokens: int, *, mode: KVMode = "auto", store: bool = True
) -> GenerateRequest:
    """Read a prompt and answer with exactly so many tokens; 0: only read."""
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    return GenerateRequest(
        f"bench-{next(_request_numbers)}", tuple(token_ids), sampling, mode=mode, store=store
    )


def timed_read(engine: Engine, token_ids: Sequence[int], *, store: bool) -> tuple[float, FinishedEvent]:
    """Bring a prompt's KV onto the device, from wherever it is. Seconds on the wall, and the event."""
    started = perf_counter()
    (event,) = engine.generate([request(token_ids, 0, store=store)])
    return perf_counter() - started, event


def flush(engine: Engine) -> None:
    """Wait until all that was computed is in its tiers. Raises TimeoutError."""
    if not engine.flush(FLUSH_SECONDS):
        raise TimeoutError(f"the tiers did not take what was computed within {FLUSH_SECONDS:.0f} s")


def drop_from_ram(engine: Engine, token_ids: Sequence[int]) -> None:
    """Leave a prompt's records in Redis only, as a restart does."""
    info = engine.info
    namespace = make_namespace(info.model_fingerprint, info.codec_fingerprint, "")
    engine.store.ram.delete(chain_keys(namespace, token_ids).records)


@contextmanager
def redis_at(url: str | None) -> Iterator[str]:
    """The given Redis, or a redis-server of our own on a free port, which ends with the block.

    Raises LeftOutError when there is neither.
    """
    if url:
        yield url
        return
    executable = shutil.which("redis-server")
    if executable is None:
        raise LeftOutError("no redis-server on PATH; install one or set REDIS_URL")
    with tempfile.TemporaryDirectory(prefix="aquifer-redis-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [executable, "--save", "", "--appendonly", "no", "--bind", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen([*command, "--dir", folder], stdout=subprocess.DEVNULL)
        try:
            _wait_for_redis(port, process)
            yield f"redis://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def _wait_for_redis(port: int, process: subprocess.Popen[bytes], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    with redis.Redis(port=port) as client:
        while True:
            try:
                client.ping()
                return
            except redis.ConnectionError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise LeftOutError(f"redis-server did not come up on port {port}") from None
                time.sleep(0.02)


def default_weights_folder() -> Path:
    """Where random checkpoints go when nobody names a place."""
    return Path(tempfile.gettempdir()) / "aquifer-bench"
