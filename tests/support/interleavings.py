"""Random interleavings of everything that can happen to a stored document, held to plain `generate`.

An interleaving is a machine too small for its work and a few actions: questions that are asked while others
are being answered, documents read ahead, pages and records that vanish, documents forgotten, requests
cancelled. Whatever the order, every answer must be that of plain `generate`, and at the end everything
must have been given back. The number of an interleaving settles its machine and its actions; threads
settle the rest.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, Self

from asking import Events, answer, ask, prompt, submit
from devices import DEVICE
from tiny_models import build, greedy_reference, tiny_model
from transformers import PreTrainedModel

from aquifer.cachestore.keys import PromptKeys, chain_keys, make_namespace
from aquifer.cachestore.redis_link import RedisLink
from aquifer.cachestore.redis_tier import RedisTier
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.types import Event, FailedEvent, FinishedEvent, KVMode, TokenEvent

_FAMILIES = ("llama", "qwen2", "qwen3")
_LONGEST_ANSWER = 8
_MODES: tuple[KVMode, ...] = ("auto", "resident", "streamed", "verified", "selective")
_REDIS_RECORD_BYTES = 1 << 20
_SECONDS = 30.0
"""Without an end after so long, a request hangs."""

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


@dataclass
class Run:
    """One interleaving on its way. prefix: of every salt, so that runs share no record."""

    machine: Machine
    redis_url: str
    engine: Engine
    prefix: str
    counts: Counter[str]
    open: list[tuple[Ask, Events]] = field(default_factory=list)

    def salt(self, number: int) -> str:
        return f"{self.prefix}-tenant-{number}"

    def keys(self, number: int, salt: int) -> PromptKeys:
        info = self.engine.info
        namespace = make_namespace(info.model_fingerprint, info.codec_fingerprint, self.salt(salt))
        return chain_keys(namespace, PROMPTS[number])

    def settle(self) -> None:
        """Wait for everything that was asked, and hold it to what plain `generate` says."""
        while self.open:
            action, events = self.open.pop(0)
            action.check(self, events)
        assert self.engine.flush(_SECONDS), "records do not reach their tiers"

    def end(self) -> None:
        """Settle, and see that nothing is held."""
        self.settle()
        parts = self.engine._parts
        assert self.engine.store.ram.open_leases == 0, "leases are open"
        for name, pool in (("device", parts.pool), ("index", parts.index)):
            assert pool.available_pages == pool.num_pages, f"{name} pages are held"
        self.counts["evicted from ram"] += self.engine.store.ram.stats().evictions


@dataclass(frozen=True)
class Ask:
    """Ask a question; nothing waits for the answer. new_tokens 0 reads the document ahead."""

    number: int
    salt: int
    mode: KVMode
    new_tokens: int
    store: bool
    cancel_after: int | None

    @classmethod
    def draw(cls, dice: random.Random, numbers: Sequence[int]) -> Self:
        return cls(
            number=dice.choice(numbers),
            salt=dice.choice((0, 0, 0, 1)),
            mode=dice.choice(_MODES),
            new_tokens=dice.choice((0, 1, 4, _LONGEST_ANSWER)),
            store=dice.random() < 0.85,
            cancel_after=dice.choice((None,) * 5 + (1, 3)),
        )

    def do(self, run: Run) -> None:
        budget = 1.0 if self.mode == "selective" else None
        request = ask(
            PROMPTS[self.number],
            self.new_tokens,
            mode=self.mode,
            budget=budget,
            cache_salt=run.salt(self.salt),
            store=self.store,
        )
        left = [self.cancel_after]

        def count_down(event: Event) -> None:
            if isinstance(event, TokenEvent) and left[0] is not None:
                left[0] -= 1
                if left[0] == 0:
                    run.engine.cancel(request.request_id)

        run.open.append((self, submit(run.engine, request, count_down)))

    def check(self, run: Run, events: Events) -> None:
        end = events.wait(_SECONDS)
        if isinstance(end, FailedEvent):
            assert end.kind == "too_long", f"{self} failed: {end}"
            run.counts["refused"] += 1
            return
        assert isinstance(end, FinishedEvent)
        if end.kv.mode == "selective":
            expected = _selective_reference(run.machine.family, self.number, run.machine.shared_selection)
        else:
            expected = _reference(run.machine.family, self.number)
        tokens = events.tokens
        assert tokens == expected[: len(tokens)], (
            f"{self} in mode {end.kv.mode} with {end.cached} answered {tokens}, not {expected}"
        )
        if end.reason == "length":
            assert len(tokens) == self.new_tokens
        run.counts["answers" if tokens else "documents read ahead"] += 1
        run.counts[f"mode {end.kv.mode}"] += 1
        run.counts["cancelled"] += end.reason == "cancelled"
        run.counts["tokens"] += len(tokens)
        for tier in ("gpu", "ram", "redis"):
            run.counts[f"restored from {tier}"] += getattr(end.cached, tier) > 0


@dataclass(frozen=True)
class Drop:
    """Records of one document vanish from a tier, all or every other one, whatever is running."""

    number: int
    salt: int
    tier: str
    step: int

    @classmethod
    def draw(cls, dice: random.Random, numbers: Sequence[int]) -> Self:
        tier = dice.choice(("gpu", "ram", "ram", "redis"))
        return cls(dice.choice(numbers), dice.choice((0, 0, 0, 1)), tier, dice.choice((1, 1, 2)))

    def do(self, run: Run) -> None:
        records, store = run.keys(self.number, self.salt).records[:: self.step], run.engine.store
        if self.tier == "gpu":
            parts = run.engine._parts
            run.engine._call(parts.pool.drop_idle)
            run.engine._call(parts.index.drop_idle)
        elif self.tier == "ram":
            run.counts["dropped from ram"] += store.ram.delete(records)
        elif store.redis is not None:
            run.counts["dropped from redis"] += store.redis.delete(records)


@dataclass(frozen=True)
class Forget:
    """A document is forgotten in every tier, whatever is running."""

    number: int
    salt: int

    @classmethod
    def draw(cls, dice: random.Random, numbers: Sequence[int]) -> Self:
        return cls(dice.choice(numbers), dice.choice((0, 1)))

    def do(self, run: Run) -> None:
        run.engine.forget(PROMPTS[self.number], run.salt(self.salt))
        run.counts["forgotten"] += 1


@dataclass(frozen=True)
class Settle:
    """Nothing is asked until all answers are there, and all records in their tiers."""

    @classmethod
    def draw(cls, dice: random.Random, numbers: Sequence[int]) -> Self:
        return cls()

    def do(self, run: Run) -> None:
        run.settle()


@dataclass(frozen=True)
class Restart:
    """The service ends and starts again: only Redis remembers."""

    @classmethod
    def draw(cls, dice: random.Random, numbers: Sequence[int]) -> Self:
        return cls()

    def do(self, run: Run) -> None:
        run.end()
        run.engine.close()
        run.engine = run.machine.start(run.redis_url)
        run.counts["restarts"] += 1


class Action(Protocol):
    """Something that happens. `draw` takes the prompts that an interleaving is about."""

    @classmethod
    def draw(cls, dice: random.Random, numbers: Sequence[int]) -> Self: ...

    def do(self, run: Run) -> None: ...


_KINDS: dict[type[Action], int] = {Ask: 10, Drop: 2, Forget: 1, Settle: 3, Restart: 1}
"""How often each happens."""


@dataclass(frozen=True)
class Interleaving:
    machine: Machine
    actions: tuple[Action, ...]

    @classmethod
    def numbered(cls, number: int) -> Self:
        dice = random.Random(number)
        numbers = dice.sample(range(len(PROMPTS)), 3)
        kinds = dice.choices(list(_KINDS), list(_KINDS.values()), k=dice.randrange(6, 13))
        return cls(Machine.draw(dice), tuple(kind.draw(dice, numbers) for kind in kinds))

    def run(self, redis_url: str, counts: Counter[str]) -> None:
        """Raises AssertionError where it goes wrong."""
        engine = self.machine.start(redis_url)
        run = Run(self.machine, redis_url, engine, f"run-{next(_run_numbers)}", counts)
        try:
            for action in self.actions:
                action.do(run)
                counts["actions"] += 1
            run.end()
        finally:
            run.engine.close()

    def shrunk(self, redis_url: str, attempts: int = 60) -> Interleaving:
        """As few of the actions as still go wrong. Threads may hide a failure, so each try has three runs."""
        actions = list(self.actions)
        at = 0
        while at < len(actions) and attempts > 0:
            fewer = Interleaving(self.machine, (*actions[:at], *actions[at + 1 :]))
            attempts -= 1
            if any(fewer.failure(redis_url) for _ in range(3)):
                actions, at = list(fewer.actions), 0
            else:
                at += 1
        return Interleaving(self.machine, tuple(actions))

    def failure(self, redis_url: str) -> str | None:
        """What goes wrong, if anything does."""
        try:
            self.run(redis_url, Counter())
        except AssertionError as error:
            return str(error)
        return None


def check_interleavings(numbers: Sequence[int], redis_url: str) -> Counter[str]:
    """Run these interleavings. Raises AssertionError with the shortest form of the first that goes wrong."""
    counts: Counter[str] = Counter()
    for number in numbers:
        interleaving = Interleaving.numbered(number)
        try:
            interleaving.run(redis_url, counts)
        except AssertionError as error:
            shortest = interleaving.shrunk(redis_url)
            lines = "\n  ".join(map(repr, (shortest.machine, *shortest.actions)))
            message = f"interleaving {number} goes wrong: {error}\nshortest form that does:\n  {lines}"
            raise AssertionError(message) from error
        counts["interleavings"] += 1
    return counts


def _count() -> Iterator[int]:
    number = random.SystemRandom().randrange(1 << 30)  # several processes may share one Redis
    while True:
        yield number
        number += 1


_run_numbers = _count()


@functools.cache
def _model(family: str) -> PreTrainedModel:
    # On CUDA with heads of a width that its kernels know, so that it is them who are tested.
    return tiny_model(family, num_hidden_layers=2, head_dim=64 if DEVICE.type == "cuda" else 16)


@functools.cache
def _reference(family: str, number: int) -> list[int]:
    return greedy_reference(_model(family), PROMPTS[number], _LONGEST_ANSWER)


@functools.cache
def _selective_reference(family: str, number: int, shared: bool) -> list[int]:
    """What an engine answers that does nothing else and never did: rows are rounded to 4 bits, so plain
    `generate` is not the measure even where every token is selected."""
    with _quiet_engine(family, shared) as engine:
        return answer(engine, ask(PROMPTS[number], _LONGEST_ANSWER, mode="selective", budget=1.0))[0]


@contextmanager
def _quiet_engine(family: str, shared: bool) -> Iterator[Engine]:
    engine = build(_model(family), keep=False, shared_selection=shared)
    try:
        yield engine
    finally:
        engine.close()
