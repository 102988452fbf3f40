"""The service's decode modes beside each other: are the exact ones exact, and what do they all hold?

Every prompt is read once and stored; each mode then answers from the same stored bytes, through the engine
that serves. `resident` is the yardstick.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

from aquifer.server.engine.build import build_engine, load_tokenizer
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.types import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    KVMode,
    SamplingParams,
    TokenEvent,
)
from aquifer.server.metrics import Metrics
from aquifer.server.settings import Settings
from aquifer.workloads.evaluation import EvalPlan, Item, answer_room, load_items
from aquifer.workloads.registry import SCORERS
from aquifer.workloads.tasks import TaskName

MODES: tuple[KVMode, ...] = ("resident", "streamed", "verified", "selective")


@dataclass(frozen=True)
class ModesPlan:
    """tasks: `samples` prompts of each, `tokens` long. new_tokens: at most so many of an answer; None: as
    many as it needs. batch: requests of one mode that run together."""

    tasks: tuple[TaskName, ...]
    tokens: int
    samples: int
    seed: int = 1
    new_tokens: int | None = None
    batch: int = 4


@dataclass(frozen=True)
class ModeResult:
    """One mode over all prompts.

    identical: prompts whose tokens, all of them, are those of `resident`.
    score: 0..100, mean over the tasks; None where answers were cut short.
    accepted: share of drafts. checks_per_token: passes over the whole cache per token.
    device_bytes_per_token: by use, largest seen while one request ran alone, per prompt token.
    """

    mode: KVMode
    prompts: int
    identical: int
    generated_tokens: int
    score: float | None
    accepted: float | None
    checks_per_token: float | None
    device_bytes_per_token: dict[str, float]


@dataclass(frozen=True)
class _Answer:
    tokens: tuple[int, ...]
    end: FinishedEvent


def compare_modes(
    plan: ModesPlan, settings: Settings, progress: Callable[[str, int, int], None]
) -> list[ModeResult]:
    """Run all modes. settings: model, codec, device, budget of `selective`.

    Raises ValueError for what the engine refuses to serve, and RuntimeError if a request fails.
    """
    tokenizer = load_tokenizer(settings)
    prompts = [
        (task, item)
        for task in plan.tasks
        for item in load_items(
            EvalPlan(task, "full", plan.tokens, plan.samples, plan.seed), tokenizer, settings
        )
    ]
    settings = settings.model_copy(
        update={
            "gpu_cache": False,
            "load_gate": "always",
            "redis_url": None,
            "streamed_gpu_bytes": 0,
            "max_running_requests": plan.batch,
        }
    )
    engine = build_engine(settings, Metrics())
    try:
        answers: dict[KVMode, list[_Answer]] = {mode: [] for mode in MODES}
        for start in range(0, len(prompts), plan.batch):
            batch = [item for _, item in prompts[start : start + plan.batch]]
            progress("storing", start, len(prompts))
            _run(engine, batch, "resident", plan, store=True)
            for mode in MODES:
                progress(mode, start, len(prompts))
                answers[mode] += _run(engine, batch, mode, plan)
            if start + plan.batch < len(prompts):
                for item in batch:
                    engine.forget(item.prompt, "")
        progress("memory", len(prompts), len(prompts))
        memory = {mode: _device_bytes(engine, batch[0], mode, plan) for mode in MODES}
    finally:
        engine.close()
    return [_result(mode, answers, prompts, plan, memory[mode]) for mode in MODES]


def write_results(results: Sequence[ModeResult], path: Path) -> None:
    path.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


def _run(
    engine: Engine, items: Sequence[Item], mode: KVMode, plan: ModesPlan, *, store: bool = False
) -> list[_Answer]:
    """Answer some prompts together; with `store`, read and store them only."""
    running = [_submit(engine, item, mode, 0 if store else _room(item, plan)) for item in items]
    answers = [future.result() for future in running]
    if store and not engine.flush(timeout=600):
        raise RuntimeError("the store did not take the prompts within ten minutes")
    return answers


def _submit(
    engine: Engine,
    item: Item,
    mode: KVMode,
    room: int,
    watch: Callable[[], None] = lambda: None,
) -> Future[_Answer]:
    """watch: called with every token, on the engine's thread."""
    result: Future[_Answer] = Future()
    tokens: list[int] = []

    def sink(event: Event) -> None:
        if isinstance(event, TokenEvent):
            tokens.append(event.token_id)
            watch()
        elif isinstance(event, FinishedEvent):
            result.set_result(_Answer(tuple(tokens), event))
        elif isinstance(event, FailedEvent):
            result.set_exception(RuntimeError(event.message))

    request = GenerateRequest(
        f"{mode} {id(result)}", item.prompt, SamplingParams(max_new_tokens=room), mode=mode, store=room == 0
    )
    engine.submit(request, sink)
    return result


def _room(item: Item, plan: ModesPlan) -> int:
    return min(answer_room(item), plan.new_tokens or answer_room(item))


def _device_bytes(engine: Engine, item: Item, mode: KVMode, plan: ModesPlan) -> dict[str, float]:
    """Device bytes of one request by use, per prompt token."""
    largest: dict[str, int] = {}

    def watch() -> None:
        for use, count in engine.load().device_bytes.items():
            largest[use] = max(count, largest.get(use, 0))

    _submit(engine, item, mode, min(16, _room(item, plan)), watch).result()
    return {use: count / len(item.prompt) for use, count in largest.items() if use != "weights"}


def _result(
    mode: KVMode,
    answers: dict[KVMode, list[_Answer]],
    prompts: Sequence[tuple[TaskName, Item]],
    plan: ModesPlan,
    memory: dict[str, float],
) -> ModeResult:
    own = answers[mode]
    generated = sum(len(answer.tokens) for answer in own)
    drafts = [answer.end.drafts for answer in own if answer.end.drafts]
    scores = [
        SCORERS[task](answer.end.text, item.answer) for (task, item), answer in zip(prompts, own, strict=True)
    ]
    return ModeResult(
        mode=mode,
        prompts=len(prompts),
        identical=sum(a.tokens == b.tokens for a, b in zip(own, answers["resident"], strict=True)),
        generated_tokens=generated,
        score=100 * sum(scores) / len(scores) if plan.new_tokens is None else None,
        accepted=sum(d.accepted for d in drafts) / sum(d.drafted for d in drafts) if drafts else None,
        checks_per_token=sum(d.checks for d in drafts) / generated if drafts else None,
        device_bytes_per_token=memory,
    )
