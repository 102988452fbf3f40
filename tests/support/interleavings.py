"""Random interleavings of everything that can happen to a stored document, held to plain `generate`.

An interleaving is a machine too small for its work and a few actions: questions that are asked while others
are being answered, documents read ahead, pages and records that vanish, documents forgotten, requests
cancelled. Whatever the order, every answer must be that of plain `generate`, as likely as there, and at the
end everything must have been given back. The number of an interleaving settles its machine and its actions;
threads settle the rest.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

from asking import Events, ask, submit
from small_machines import LONGEST_ANSWER, PROMPTS, Host, Machine, reference, selective_reference

from aquifer.cachestore.keys import PromptKeys, chain_keys, make_namespace
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.types import Event, FailedEvent, FinishedEvent, KVMode, TokenEvent

_MODES: tuple[KVMode, ...] = ("auto", "resident", "streamed", "verified", "selective")
_SECONDS = 30.0
"""Without an end after so long, a request hangs."""

_SHRINK_SECONDS = 60.0

_ONE_ENGINE = 5
"""Interleavings in a row on one machine, and as far as nothing restarts it, one engine."""


@dataclass
class Run:
    """One interleaving on its way."""

    host: Host
    counts: Counter[str]
    open: list[tuple[Ask, Events]] = field(default_factory=list)

    @property
    def engine(self) -> Engine:
        return self.host.engine

    def salt(self, number: int) -> str:
        return f"{self.host.name}-tenant-{number}"

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
            new_tokens=dice.choice((0, 1, 4, LONGEST_ANSWER)),
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
        machine = run.host.machine
        if end.kv.mode == "selective":
            expected = selective_reference(machine.family, self.number, machine.shared_selection)
        else:
            expected = reference(machine.family, self.number)
        tokens = events.tokens
        wrong = expected.difference(tokens, events.logprobs)
        assert wrong is None, f"{self} in mode {end.kv.mode} with {end.cached} answered {wrong}"
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
        run.host.restart()
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
        return cls(_machine(number // _ONE_ENGINE), tuple(kind.draw(dice, numbers) for kind in kinds))

    def run(self, host: Host, counts: Counter[str]) -> None:
        """Raises AssertionError where it goes wrong."""
        run = Run(host, counts)
        for action in self.actions:
            action.do(run)
            counts["actions"] += 1
        run.end()

    def failure(self, redis_url: str) -> str | None:
        """What goes wrong on an engine of its own, if anything does."""
        with Host(self.machine, redis_url).open() as host:
            try:
                self.run(host, Counter())
            except AssertionError as error:
                return str(error)
        return None

    def shrunk(self, redis_url: str) -> Self:
        """As few of the actions as still go wrong, if found in time. Threads may hide a failure, so each try
        has three runs."""
        actions, at = list(self.actions), 0
        deadline = time.monotonic() + _SHRINK_SECONDS
        while at < len(actions) and time.monotonic() < deadline:
            fewer = replace(self, actions=(*actions[:at], *actions[at + 1 :]))
            if any(fewer.failure(redis_url) for _ in range(3)):
                actions, at = list(fewer.actions), 0
            else:
                at += 1
        return replace(self, actions=tuple(actions))


def check_interleavings(numbers: Sequence[int], redis_url: str) -> Counter[str]:
    """Run these interleavings. Raises AssertionError with the shortest form of the first that goes wrong."""
    counts: Counter[str] = Counter()
    for block, some in itertools.groupby(numbers, lambda number: number // _ONE_ENGINE):
        with Host(_machine(block), redis_url).open() as host:
            for number in some:
                interleaving = Interleaving.numbered(number)
                try:
                    interleaving.run(host, counts)
                except AssertionError as error:
                    raise AssertionError(_report(number, interleaving, error, redis_url)) from error
                counts["interleavings"] += 1
        counts["evicted from ram"] += host.evictions
    return counts


def _machine(block: int) -> Machine:
    return Machine.draw(random.Random(f"machine {block}"))


def _report(number: int, interleaving: Interleaving, error: AssertionError, redis_url: str) -> str:
    shortest, how = interleaving, "not by itself, but behind those that ran on its engine before:"
    if any(interleaving.failure(redis_url) for _ in range(3)):
        shortest, how = interleaving.shrunk(redis_url), "shortest form that does:"
    lines = "\n  ".join([how, *map(repr, (shortest.machine, *shortest.actions))])
    return f"interleaving {number} goes wrong: {error}\n{lines}"
