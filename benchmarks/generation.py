"""`aquifer bench prefill`, `decode` and `throughput`: the model at work."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache

import torch

from aquifer.benchmarks.acceptance import imposed_acceptance
from aquifer.benchmarks.answers import QUESTION_TOKENS, Answers, Stage, longest_answer
from aquifer.benchmarks.engines import Needs, engine_for, plant, random_prompt, timed_read
from aquifer.benchmarks.geometries import Subject
from aquifer.benchmarks.harness import Contestant, Report, Row, Run
from aquifer.benchmarks.limits import decode_bytes, measure_limits, prefill_flop
from aquifer.benchmarks.memory import DecodingMemory
from aquifer.benchmarks.peers import PeerName, hf_decode, hf_prefill, load_hf, taking_part
from aquifer.benchmarks.selection import Rows, RowsKind, check_imposable
from aquifer.benchmarks.transfer import check_whole, new_report
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.selective import selected_tokens
from aquifer.server.engine.types import KVMode
from aquifer.server.metrics import Metrics
from aquifer.server.settings import load_settings

_ROWS_NAMES: dict[RowsKind, str] = {
    "own": "",
    "misses": ", no row found",
    "trace": ", rows found as in the trace",
}

_SELECTING: frozenset[KVMode] = frozenset({"selective", "verified"})
"""Modes that choose rows."""

_DECODING_PEERS: tuple[PeerName, ...] = ("hf-dynamic", "hf-offloaded", "hf-quanto", "hf-static-graph")


def bench_prefill(subject: Subject, tokens: int, repeat: int, peers: Sequence[str]) -> Report:
    """A prompt read for the first time, and not stored. Raises ValueError unless it is whole segments."""
    check_whole(tokens)
    report = new_report("prefill", subject, tokens=tokens, repeat=repeat)
    limits = measure_limits(subject)
    with engine_for(subject, Needs("raw", tokens)) as engine:

        def prefill() -> float:
            return timed_read(engine, random_prompt(subject, tokens), store=False)[0]

        makers: dict[str, Callable[[], Run]] = {
            "hf-dynamic": lambda: hf_prefill(subject, load_hf(subject), tokens)
        }
        others = taking_part(report, subject, peers, makers)
        report.measure([Contestant("prefill", "ours", prefill), *others], repeat)
    seconds = prefill_flop(subject, tokens) / limits.flop_per_second
    report.rows.append(Row("its arithmetic at the rate of a large GEMM", "limit", {"seconds": seconds}))
    for row in report.rows:
        row.figures["tokens_per_second"] = tokens / row.figures["seconds"]
    report.compare()
    return report


@dataclass(frozen=True)
class Decoding:
    """How contexts are decoded. budget: share of the context that selective attention reads; None: the
    server's default. rows: where it does, which of the chosen rows are on the device already. accept: share
    of the drafts that checks of mode verified accept; None: the model's own."""

    modes: Sequence[KVMode]
    budget: float | None = None
    rows: Sequence[RowsKind] = ("own",)
    accept: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for an `accept` that would say nothing."""
        if self.accept is not None and "verified" not in self.modes:
            raise ValueError(
                f"--accept {self.accept:g} is the share of drafts that mode verified accepts; measured here: "
                f"{', '.join(self.modes)}. Add --mode verified"
            )

    @property
    def selects(self) -> bool:
        return bool(_SELECTING & set(self.modes))

    @property
    def cases(self) -> list[tuple[str, KVMode, RowsKind]]:
        """What is measured: a name, the mode, and the rows."""
        return [
            (mode + _ROWS_NAMES[kind], mode, kind)
            for mode in self.modes
            for kind in (self.rows if mode in _SELECTING else ("own",))
        ]

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the figures."""
        notes = ["contexts are random KV: row hits and accepted drafts are not those of a text"]
        if self.accept is not None:
            notes.append(f"checks accept {self.accept:.0%} of the drafts, whatever the model says")
        return notes

    @contextmanager
    def imposed(self, subject: Subject, tokens: int) -> Iterator[Rows | None]:
        """Within it, engines accept the share of drafts that is asked for. What makes them choose rows other
        than the model's own, where any are asked for.

        Raises ValueError if that cannot be done."""
        accepted = nullcontext() if self.accept is None else imposed_acceptance(self.accept)
        with accepted, self._imposed_rows(subject, tokens) as rows:
            yield rows

    @contextmanager
    def _imposed_rows(self, subject: Subject, tokens: int) -> Iterator[Rows | None]:
        if set(self.rows) == {"own"}:
            yield None
            return
        budget = load_settings().selective_budget if self.budget is None else self.budget
        prompt_tokens = tokens + QUESTION_TOKENS
        check_imposable(prompt_tokens, selected_tokens(prompt_tokens, budget))
        rows = Rows(subject.spec, subject.device)
        with rows.imposed():
            yield rows


def bench_decode(
    subject: Subject, needs: Needs, decoding: Decoding, repeat: int, peers: Sequence[str]
) -> Report:
    """One step behind long contexts, needs.contexts of them at once.

    Raises ValueError unless the contexts are whole segments.
    """
    check_whole(needs.tokens)
    report = new_report("decode", subject, **_described(needs, decoding), repeat=repeat)
    report.notes += decoding.notes
    limits, metrics, steps = measure_limits(subject), Metrics(), needs.new_tokens
    room = _room_for(needs)
    on_cuda = subject.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_cuda else 0
    with decoding.imposed(subject, needs.tokens) as imposed, engine_for(subject, room, metrics) as engine:
        load = engine.load()
        if on_cuda:
            pools = torch.cuda.memory_allocated() - before - load.device_bytes["weights"]
            report.setup |= {"pools_bytes": load.device_capacity_bytes, "pools_allocated_bytes": pools}
        prompts = _plant_all(engine, subject, needs)
        stage = Stage(engine, metrics, steps, decoding.budget, imposed, DecodingMemory(engine))
        ours = {name: Answers(stage, prompts, mode, kind) for name, mode, kind in decoding.cases}
        load_peer = cache(lambda: load_hf(subject))

        def maker(name: PeerName) -> Callable[[], Run]:
            return lambda: hf_decode(name, subject, load_peer(), needs.tokens, steps, needs.contexts)

        makers: dict[str, Callable[[], Run]] = {name: maker(name) for name in _DECODING_PEERS}
        contestants = [Contestant(name, "ours", answers.run) for name, answers in ours.items()]
        rows = report.measure([*contestants, *taking_part(report, subject, peers, makers)], repeat)
    for name in ours.keys() & rows.keys():
        rows[name].figures.update(ours[name].figures)
    seconds = decode_bytes(subject, needs.tokens, needs.contexts) / limits.bytes_per_second
    report.rows.append(Row("weights and KV through memory once", "limit", {"seconds": seconds}))
    for row in report.rows:
        row.figures["tokens_per_second"] = needs.contexts / row.figures["seconds"]
    report.compare()
    return report


def bench_throughput(
    subject: Subject, needs: Needs, decoding: Decoding, repeat: int, counts: Sequence[int]
) -> Report:
    """Tokens per second while so many contexts are being answered at once, until memory is full.

    needs.contexts is the most of `counts`. Raises ValueError unless the contexts are whole segments.
    """
    check_whole(needs.tokens)
    report = new_report("throughput", subject, **_described(needs, decoding), repeat=repeat)
    report.notes += decoding.notes
    metrics, steps, room = Metrics(), needs.new_tokens, _room_for(needs)
    with decoding.imposed(subject, needs.tokens) as imposed, engine_for(subject, room, metrics) as engine:
        prompts = _plant_all(engine, subject, needs)
        stage = Stage(engine, metrics, steps, decoding.budget, imposed, DecodingMemory(engine))
        for case, mode, kind in decoding.cases:
            for count in counts:
                name = f"{case}, {count} contexts"
                answers = Answers(stage, prompts[:count], mode, kind)
                rows = report.measure([Contestant(name, "ours", answers.run)], repeat)
                if name not in rows:
                    break  # with more it will not work either
                figures = rows[name].figures
                figures["contexts"] = count
                figures["tokens_per_second"] = count / figures["seconds"]
                figures.update(answers.figures)
    return report


def _room_for(needs: Needs) -> Needs:
    """Answers go on until all have taken the steps that are asked for."""
    return replace(needs, new_tokens=longest_answer(needs.tokens, needs.contexts, needs.new_tokens))


def _described(needs: Needs, decoding: Decoding) -> dict[str, str | int | float | None]:
    return {
        "codec": needs.codec,
        "tokens": needs.tokens,
        "contexts": needs.contexts,
        "new_tokens": needs.new_tokens,
        "budget": decoding.budget,
        "accept": decoding.accept,
    }


def _plant_all(engine: Engine, subject: Subject, needs: Needs) -> list[array[int]]:
    codec = subject.codec(needs.codec)
    prompts = [random_prompt(subject, needs.tokens) for _ in range(needs.contexts)]
    for prompt in prompts:
        plant(engine, subject, codec, prompt)
    return prompts
