"""Engines and Redis servers for measurements, and the few things that are asked of them."""

from __future__ import annotations

import itertools
import shutil
import socket
import subprocess
import tempfile
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import redis
import torch
from torch import Tensor

from aquifer.benchmarks.geometries import Subject
from aquifer.benchmarks.harness import LeftOutError
from aquifer.cachestore.keys import PromptKeys, SegmentKey, chain_keys, make_namespace
from aquifer.compression.codec import Codec
from aquifer.compression.spec import SEGMENT_TOKENS, SINK_TOKENS
from aquifer.compression.wire import RecordHeader, sealed
from aquifer.server.engine.build import build_engine
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.pages import pages_of
from aquifer.server.engine.records import segment_span, slot_bytes
from aquifer.server.engine.types import FinishedEvent, GenerateRequest, KVMode, SamplingParams
from aquifer.server.metrics import Metrics
from aquifer.server.settings import MIB, load_settings

STORE_SECONDS = 600.0

FIRST_ID = 3
"""Below it lie the bundled model's special tokens."""

QUESTION_TOKENS = 32
"""Asked behind a document whose KV is kept."""

_ROWS_SHARE, _LANDMARKS_SHARE = 0.26, 1 / 12
"""Of uncompressed KV: more than the rows of selective decoding take in host memory, and their landmarks on
the device, in any dtype."""

_INDEX_SHARE = 0.5
"""Added to the device's KV bytes for landmarks, of which the engine takes what the rows allow."""

_DISTINCT_SEGMENTS = 8
"""Planted segments repeat after so many: neighbours differ, and they are quickly made."""

_request_numbers = itertools.count()


@dataclass(frozen=True)
class Needs:
    """What one measurement asks of an engine.

    codec: as in the settings. contexts, tokens: how many prompts of which length exist at once.
    new_tokens: the longest answer. on_device: prompts stay on the device after their request; otherwise
    every request finds them in the tiers below, or nowhere. device_bytes: room for KV on the device;
    None: as much as the contexts need. indexed: room for what selective decoding looks tokens up in.
    streamed_bytes: of the device, that one streamed request fills with segments.
    """

    codec: str
    tokens: int
    contexts: int = 1
    new_tokens: int = 0
    on_device: bool = False
    redis_url: str | None = None
    device_bytes: int | None = None
    indexed: bool = False
    streamed_bytes: int = 0


@contextmanager
def engine_for(subject: Subject, needs: Needs, metrics: Metrics | None = None) -> Iterator[Engine]:
    """An engine with just the memory that a measurement needs, so that a large one fits a small machine."""
    raw_bytes = subject.spec.bytes_per_token * (needs.tokens + 2 * SEGMENT_TOKENS) * needs.contexts
    answers = subject.spec.bytes_per_token * needs.contexts * (needs.new_tokens + SEGMENT_TOKENS)
    codec, raw = subject.codec(needs.codec), subject.codec("raw")
    records = needs.contexts * (pages_of(needs.tokens) + 2)
    device_bytes = needs.device_bytes or int((raw_bytes + answers) * (1 + _INDEX_SHARE * needs.indexed))
    settings = load_settings(
        model=str(subject.folder),
        device=str(subject.device),
        codec=needs.codec,
        gpu_cache=needs.on_device,
        gpu_kv_bytes=device_bytes,
        streamed_gpu_bytes=needs.streamed_bytes,
        selective_ram_bytes=int(_ROWS_SHARE * raw_bytes) * needs.indexed,
        selective_gpu_share=min(0.9, max(0.125, _LANDMARKS_SHARE * raw_bytes / device_bytes)),
        ram_bytes=int(1.1 * records * slot_bytes(codec, raw)) + 16 * MIB,
        redis_url=needs.redis_url or "",
        max_prompt_tokens=needs.tokens + SEGMENT_TOKENS,
        max_running_requests=max(16, needs.contexts),
        load_gate="always",
    )
    engine = build_engine(settings, metrics or Metrics())
    try:
        yield engine
    finally:
        engine.close()


def random_prompt(subject: Subject, tokens: int) -> array[int]:
    """Fresh random token ids, as the service has them."""
    return array("i", torch.randint(FIRST_ID, subject.config.vocab_size, (tokens,)).tolist())


def request(
    token_ids: Sequence[int],
    new_tokens: int,
    *,
    mode: KVMode = "resident",
    budget: float | None = None,
    store: bool = True,
) -> GenerateRequest:
    """Read a prompt and answer with exactly so many tokens; 0: only read."""
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    name = f"bench-{next(_request_numbers)}"
    return GenerateRequest(name, token_ids, sampling, mode=mode, budget=budget, store=store)


def timed_read(engine: Engine, token_ids: Sequence[int], *, store: bool) -> tuple[float, FinishedEvent]:
    """Bring a prompt's KV onto the device, from wherever it is. Seconds on the wall, and the event."""
    started = perf_counter()
    (event,) = engine.generate([request(token_ids, 0, store=store)])
    return perf_counter() - started, event


def wait_until_stored(engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
    """Wait until every record of these prompts is in its tiers. Raises TimeoutError."""
    keys = [key for prompt in prompts for key in keys_of(engine, prompt).records]
    deadline = time.monotonic() + STORE_SECONDS
    while None in engine.store.contains(keys) or not engine.flush(STORE_SECONDS):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the tiers did not take what was computed within {STORE_SECONDS:.0f} s")
        time.sleep(0.01)


def keys_of(engine: Engine, token_ids: Sequence[int]) -> PromptKeys:
    """The names under which an engine stores a prompt."""
    info = engine.info
    return chain_keys(make_namespace(info.model_fingerprint, info.codec_fingerprint, ""), token_ids)


def drop_from_ram(engine: Engine, token_ids: Sequence[int]) -> None:
    """Leave a prompt's records in Redis only, as a restart does."""
    engine.store.ram.delete(keys_of(engine, token_ids).records)


def plant(engine: Engine, subject: Subject, codec: Codec, token_ids: Sequence[int]) -> None:
    """Put random KV into the RAM tier under the keys of a prompt, as if it had been read and stored.

    Steps over such a context read as many bytes as over any other, and no prefill is needed. Raises
    MemoryError when the tier has no room.
    """
    raw = subject.codec("raw")
    keys = keys_of(engine, token_ids)
    bodies = [_random_body(subject, codec, SEGMENT_TOKENS) for _ in range(_DISTINCT_SEGMENTS)]
    for index, key in enumerate(keys.segments):
        start, count = segment_span(index)
        own = index % _DISTINCT_SEGMENTS
        body = bodies[own] if count == SEGMENT_TOKENS else _random_body(subject, codec, count)
        _put(engine, key, RecordHeader("segment", codec.fingerprint, key.digest, start, count), body)
    if keys.sinks is not None:
        header = RecordHeader("sinks", raw.fingerprint, keys.sinks.digest, 0, SINK_TOKENS)
        _put(engine, keys.sinks, header, _random_body(subject, raw, SINK_TOKENS))


def _put(engine: Engine, key: SegmentKey, header: RecordHeader, body: memoryview) -> None:
    if not engine.store.put(key, sealed(header, body)):
        raise MemoryError("the RAM tier has no room for another context")


def _random_body(subject: Subject, codec: Codec, count: int) -> memoryview:
    """The bytes of `count` tokens of random KV."""
    keys, values = random_kv(subject, count)
    (body,) = codec.encode(keys, values, [count])
    return body.cpu().numpy().data


def random_kv(subject: Subject, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values [L, T, C] of normally distributed numbers."""
    spec = subject.spec
    shape = (spec.num_layers, tokens, spec.channels)
    keys, values = (torch.randn(shape, dtype=spec.dtype, device=subject.device) for _ in range(2))
    return keys, values


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
