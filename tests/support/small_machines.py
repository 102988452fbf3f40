"""Machines too small for their work, the prompts that they are asked, and what the right answers are."""

from __future__ import annotations

import atexit
import functools
import random
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from asking import ask, prompt, submit
from devices import DEVICE
from tiny_models import build, greedy_reference, tiny_model
from transformers import PreTrainedModel

from aquifer.cachestore.redis_link import RedisLink
from aquifer.cachestore.redis_tier import RedisTier
from aquifer.server.engine.engine import Engine

LONGEST_ANSWER = 8

_FAMILIES = ("llama", "qwen2", "qwen3")
_REDIS_RECORD_BYTES = 1 << 20

_TRUNK = prompt(0, 512)
_DOCUMENTS = (_TRUNK[:256], _TRUNK, _TRUNK + prompt(1, 270), prompt(2, 530), prompt(3, 90))
_QUESTIONS = (prompt(4, 1), prompt(5, 20), prompt(6, 130))
PROMPTS = [document + question for document in _DOCUMENTS for question in _QUESTIONS]
"""Documents that share their beginnings, some with whole segments only, each with three questions."""


@dataclass(frozen=True)
class Machine:
    """The model, and how little there is of everything; see `tiny_models.build`."""

    family: str
    pages: int
    index_pages: int
    slots: int
    keep: bool
    streamed_bytes: int | None
    chunk_tokens: int
    max_running: int
    shared_selection: bool
    with_redis: bool

    @classmethod
    def draw(cls, dice: random.Random) -> Self:
        return cls(
            family=dice.choice(_FAMILIES),
            pages=dice.randrange(5, 14),
            index_pages=dice.randrange(9),
            slots=dice.randrange(4, 12),
            keep=dice.random() < 0.5,
            streamed_bytes=dice.choice((0, 1 << 20, None)),
            chunk_tokens=dice.choice((256, 512)),
            max_running=dice.choice((1, 3, 8)),
            shared_selection=dice.random() < 0.3,
            with_redis=dice.random() < 0.5,
        )

    def start(self, redis_url: str) -> Engine:
        redis = None
        if self.with_redis:
            link = RedisLink(redis_url, timeout_seconds=5.0)
            redis = RedisTier(link, max_record_bytes=_REDIS_RECORD_BYTES)
        return build(
            _model(self.family),
            pages=self.pages,
            index_pages=self.index_pages,
            slots=self.slots,
            keep=self.keep,
            streamed_bytes=self.streamed_bytes,
            chunk_tokens=self.chunk_tokens,
            max_running=self.max_running,
            shared_selection=self.shared_selection,
            redis=redis,
        )


class Host:
    """A machine and the engine that runs on it."""

    def __init__(self, machine: Machine, redis_url: str) -> None:
        self.machine = machine
        self.name = f"host-{uuid.uuid4().hex[:8]}"
        """Begins every salt, so that hosts share no record, wherever they run."""
        self.evictions = 0
        """From the RAM tiers of engines that ended."""
        self._redis_url = redis_url
        self.engine = machine.start(redis_url)

    def restart(self) -> None:
        """As a service that ends and starts again: only Redis remembers."""
        self._close()
        self.engine = self.machine.start(self._redis_url)

    @contextmanager
    def open(self) -> Iterator[Self]:
        try:
            yield self
        finally:
            self._close()

    def _close(self) -> None:
        self.evictions += self.engine.store.ram.stats().evictions
        self.engine.close()


@functools.cache
def _model(family: str) -> PreTrainedModel:
    # On CUDA with heads of a width that its kernels know, so that it is them who are tested.
    return tiny_model(family, num_hidden_layers=2, head_dim=64 if DEVICE.type == "cuda" else 16)


@dataclass(frozen=True)
class Expected:
    """The right answer, and the log probability of each of its tokens: a fault in the KV may leave the most
    likely tokens what they are, but not how likely they are."""

    tokens: list[int]
    logprobs: list[float]
    near: float
    """How far log probabilities may be apart. Sums in another order put them 2e-6 apart on a CPU."""

    def difference(self, tokens: list[int], logprobs: list[float]) -> str | None:
        """What is wrong with the beginning of an answer, if anything is."""
        if tokens != self.tokens[: len(tokens)]:
            return f"{tokens}, not {self.tokens}"
        pairs = zip(logprobs, self.logprobs, strict=False)
        apart = max((abs(found - right) for found, right in pairs), default=0.0)
        return None if apart < self.near else f"with log probabilities that are {apart} apart"


@functools.cache
def reference(family: str, number: int) -> Expected:
    model, ids = _model(family), PROMPTS[number]
    tokens = greedy_reference(model, ids, LONGEST_ANSWER)
    with torch.inference_mode():
        logits = model(torch.tensor([[*ids, *tokens]], device=DEVICE)).logits[0, len(ids) - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(1, torch.tensor(tokens, device=DEVICE)[:, None])
    return Expected(tokens, logprobs[:, 0].tolist(), near=1e-3)


@functools.cache
def selective_reference(family: str, number: int, shared: bool) -> Expected:
    """What an engine answers that does nothing else and keeps nothing: rows are rounded to 4 bits, so plain
    `generate` is not the measure even where every token is selected."""
    request = ask(PROMPTS[number], LONGEST_ANSWER, mode="selective", budget=1.0, store=False)
    events = submit(_quiet_engine(family, shared), request)
    end = events.finished
    assert end.kv.mode == "selective" and end.cached.total == 0
    # A value in the middle between two codes may be rounded to either.
    return Expected(events.tokens, events.logprobs, near=1e-2)


@functools.cache
def _quiet_engine(family: str, shared: bool) -> Engine:
    engine = build(_model(family), keep=False, shared_selection=shared)
    atexit.register(engine.close)
    return engine
