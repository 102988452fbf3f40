"""What the first request of each kind would wait for is done before the service is ready.

Kernels are compiled when they are first launched, seconds each, so a small engine over the same model and
codec answers a made-up prompt in every way there is. Its pages, tiers and metrics are its own and go with it.
"""

from __future__ import annotations

import time
from dataclasses import replace

import structlog
import torch

from aquifer.cachestore.arena import RamArena
from aquifer.cachestore.store import TieredStore
from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.compression.wire import verify
from aquifer.server.engine.engine import Engine, EngineError
from aquifer.server.engine.gate import LoadGate
from aquifer.server.engine.host_memory import lock_for
from aquifer.server.engine.index import IndexPool
from aquifer.server.engine.pages import PagePool
from aquifer.server.engine.parts import EngineParts
from aquifer.server.engine.records import slot_bytes
from aquifer.server.engine.types import EngineInfo, GenerateRequest, KVMode, SamplingParams
from aquifer.server.metrics import Metrics

log = structlog.get_logger(__name__)

_SEGMENTS = 4
_PROMPT_TOKENS = _SEGMENTS * SEGMENT_TOKENS + 100
_NEW_TOKENS = 8
_PAGES = 8 * _SEGMENTS


def warm_up(parts: EngineParts, info: EngineInfo) -> None:
    """Answer a prompt cold, restored, and with its KV off the device. A failure is logged, and no more."""
    started = time.perf_counter()
    try:
        engine = _small_engine(parts, info)
        try:
            _answer(engine, "verified" if parts.index.num_pages else "streamed")
        finally:
            engine.close()
    except (EngineError, OSError, torch.OutOfMemoryError) as error:
        log.warning("not warmed up", reason=str(error))
        return
    log.info("warmed up", seconds=round(time.perf_counter() - started, 1))


def _small_engine(parts: EngineParts, info: EngineInfo) -> Engine:
    spec, device = parts.adapter.spec, parts.adapter.device
    record_bytes = slot_bytes(parts.codec, parts.raw)
    arena = RamArena(4 * _SEGMENTS * (record_bytes + 4096), record_bytes)
    index = IndexPool(parts.index.codec, min(_PAGES, parts.index.num_pages), device, keep=False)
    small = replace(
        parts,
        store=TieredStore(arena, None, verify),
        pool=PagePool(spec, _PAGES * SEGMENT_TOKENS * spec.bytes_per_token, device, keep=False),
        index=index,
        gate=LoadGate(always=True),
        metrics=Metrics(),
        limits=replace(parts.limits, streamed_bytes=0),
    )
    unlock = lock_for(device, [torch.frombuffer(arena.buffer, dtype=torch.uint8), index.rows])
    return Engine(small, info, lambda ids: "", unlock)


def _answer(engine: Engine, off_device: KVMode) -> None:
    info = engine.info
    length = min(_PROMPT_TOKENS, info.max_prompt_tokens, info.max_total_tokens - _NEW_TOKENS)
    prompt = tuple(number % info.vocab_size for number in range(length))
    sampling = SamplingParams(max_new_tokens=_NEW_TOKENS, ignore_eos=True)
    question = prompt[: _SEGMENTS * SEGMENT_TOKENS + 10]
    ways: list[tuple[tuple[int, ...], KVMode]] = [(prompt, "resident")] * 2
    ways += [(question, "resident"), (prompt, off_device)]  # few tokens have a kernel of their own
    for number, (ids, mode) in enumerate(ways):
        engine.generate([GenerateRequest(f"warm-up-{number}", ids, sampling, mode=mode)])
        engine.flush(timeout=60)
