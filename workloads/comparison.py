"""Offloading methods side by side on context-intensive tasks, and what breaks the ones that break.

Every sample is prefilled once and answered by all methods from there (see offload.py). Records are written
after each sample, so an interrupted run goes on where it stopped, and a later run may add methods or samples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from aquifer.compression.landmarks import KeyMeans, KeyMeansError
from aquifer.server.engine.build import LoadedModel, load_model
from aquifer.server.settings import Settings
from aquifer.workloads.evaluation import EvalPlan, Item, Progress, answer_room, load_items
from aquifer.workloads.guesses import Guesser
from aquifer.workloads.offload import Method, decode, prefill
from aquifer.workloads.registry import SCORERS
from aquifer.workloads.selectors.base import ExactKeys, ExactRows
from aquifer.workloads.selectors.spec import canonical, parse_method
from aquifer.workloads.tasks import TaskName


@dataclass(frozen=True)
class ComparePlan:
    """What to compare. samples: per task. tokens: prompt length of generated samples.

    data: a JSON Lines file with `problem` and `answer` instead of generated samples; takes a single task.
    chat: wrap prompts in the model's chat template.
    """

    tasks: tuple[TaskName, ...]
    methods: tuple[Method, ...]
    tokens: int = 8192
    samples: int = 8
    seed: int = 1
    data: Path | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        if self.data is not None and len(self.tasks) != 1:
            raise ValueError("a file of samples is of one task: name it with --tasks")

    def describe(self) -> dict[str, Any]:
        """What all records of one file have in common."""
        if self.data is not None:
            return {"data": self.data.name, "chat": self.chat}
        return {"tokens": self.tokens, "seed": self.seed, "chat": self.chat}


@dataclass(frozen=True)
class Record:
    """One method's answer to one sample. score: 0 to 1. recall: per layer. Costs as in offload.Costs."""

    task: TaskName
    sample: int
    method: str
    score: float
    stopped: bool
    prompt_tokens: int
    generated_tokens: int
    recall: list[float]
    budget: float
    bits: float
    device_bytes: float
    fetched_bytes: int


@dataclass(frozen=True)
class Summary:
    """Means over one task's samples. score: 0 to 100. error: its standard error, None for one sample.

    kept: score / score of the full cache on the same samples; None if one of them has no such score.
    kept_error: its standard error over pairs, so what is hard for both does not count.
    stopped: share of the answers that ended by themselves. recall: None where nothing is chosen.
    """

    task: TaskName
    method: str
    samples: int
    score: float
    error: float | None
    kept: float | None
    kept_error: float | None
    stopped: float
    recall: float | None
    recall_by_layer: list[float]
    budget: float
    bits: float
    device_bytes: float
    fetched_bytes: float


def methods_of(specs: str) -> tuple[Method, ...]:
    """Methods written one after the other with commas. Raises ValueError for a bad or a repeated one."""
    labels = [canonical(spec) for spec in specs.split(",") if spec.strip()]
    if not labels:
        raise ValueError("no method is named")
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(f"named twice: {', '.join(sorted(repeated))}")
    return tuple(Method.of(label, parse_method(label)) for label in labels)


def swaps_of(spec: str) -> tuple[Method, ...]:
    """A method as it is, then with exact rows, with true scores, and with both.

    Raises ValueError for a bad method, and for one that ranks nothing.
    """
    method = Method.of(canonical(spec), parse_method(spec))
    if method.ranker is None:
        raise ValueError(f"{method.label} chooses no tokens: there is nothing to swap")
    exact = replace(method, label=f"{method.label} + exact rows", store=ExactRows())
    ranked = replace(method, label=f"{method.label} + true scores", ranker=ExactKeys())
    both = replace(exact, label=f"{method.label} + both", ranker=ExactKeys())
    return method, exact, ranked, both


def compare(
    plan: ComparePlan, settings: Settings, json_file: Path | None, progress: Progress
) -> list[Record]:
    """Run what the file does not hold yet; all records of the plan, task by task and sample by sample.

    Raises ValueError for a model that cannot be served, a method that does not fit it, or another run's file.
    """
    loaded = load_model(settings)
    identity = {"model": loaded.fingerprint, **plan.describe()}
    records = _read(json_file, identity)
    means = _key_means(settings, loaded)
    labels = [method.label for method in plan.methods]
    for task in plan.tasks:
        source = EvalPlan(task, "full", plan.tokens, plan.samples, plan.seed, data=plan.data, chat=plan.chat)
        for number, item in enumerate(load_items(source, loaded.tokenizer, settings)):
            progress(task, number, plan.samples)
            done = {record.method for record in records if (record.task, record.sample) == (task, number)}
            missing = [method for method in plan.methods if method.label not in done]
            if missing:
                records += _answers(loaded, means, task, number, item, missing)
                if json_file is not None:
                    _write(json_file, identity, records)
        progress(task, plan.samples, plan.samples)
    wanted = [r for r in records if r.task in plan.tasks and r.method in labels and r.sample < plan.samples]
    return sorted(wanted, key=lambda r: (plan.tasks.index(r.task), r.sample, labels.index(r.method)))


def summarize(records: Sequence[Record]) -> list[Summary]:
    """One summary per task and method, in the order in which they first occur."""
    full = {(record.task, record.sample): record.score for record in records if record.method == "full"}
    groups: dict[tuple[TaskName, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.task, record.method), []).append(record)
    return [_summary(task, method, group, full) for (task, method), group in groups.items()]


def _summary(
    task: TaskName, method: str, records: Sequence[Record], full: dict[tuple[TaskName, int], float]
) -> Summary:
    scores = [100 * record.score for record in records]
    kept, kept_error = _kept([(record.score, full.get((task, record.sample))) for record in records])
    measured = [record.recall for record in records if record.recall]
    layers = [fmean(layer) for layer in zip(*measured, strict=True)]
    return Summary(
        task=task,
        method=method,
        samples=len(records),
        score=fmean(scores),
        error=stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None,
        kept=kept,
        kept_error=kept_error,
        stopped=fmean(record.stopped for record in records),
        recall=fmean(layers) if layers else None,
        recall_by_layer=layers,
        budget=fmean(record.budget for record in records),
        bits=fmean(record.bits for record in records),
        device_bytes=fmean(record.device_bytes for record in records),
        fetched_bytes=fmean(record.fetched_bytes for record in records),
    )


def _kept(pairs: Sequence[tuple[float, float | None]]) -> tuple[float | None, float | None]:
    """Ratio of the means of scores and full scores, and its standard error (linearized: pairs, not means)."""
    full = [score for _, score in pairs if score is not None]
    if len(full) < len(pairs) or not sum(full):
        return None, None
    kept = sum(score for score, _ in pairs) / sum(full)
    if len(pairs) == 1:
        return kept, None
    lost = [score - kept * whole for (score, _), whole in zip(pairs, full, strict=True)]
    return kept, stdev(lost) * len(pairs) ** 0.5 / sum(full)


def _answers(
    loaded: LoadedModel,
    means: KeyMeans | None,
    task: TaskName,
    number: int,
    item: Item,
    methods: Sequence[Method],
) -> list[Record]:
    room = answer_room(item)
    if len(item.prompt) + room > loaded.max_total_tokens:
        raise ValueError(
            f"a prompt of {len(item.prompt)} tokens and an answer of up to {room} do not fit: "
            f"the model takes {loaded.max_total_tokens} tokens"
        )
    device = loaded.adapter.device
    key_means = None if means is None else means.means.to(device)
    prompt, logits = prefill(loaded.adapter, item.prompt, key_means)
    answers = decode(
        loaded.adapter,
        prompt,
        logits,
        methods,
        room=room,
        eos_token_ids=loaded.eos_token_ids,
        guesser=Guesser(item.prompt, item.answer_ids),
    )
    records = []
    for method, answer in zip(methods, answers, strict=True):
        text = str(loaded.tokenizer.decode(answer.tokens, skip_special_tokens=True))
        records.append(
            Record(
                task=task,
                sample=number,
                method=method.label,
                score=SCORERS[task](text, item.answer),
                stopped=answer.stopped,
                prompt_tokens=len(item.prompt),
                generated_tokens=len(answer.tokens),
                recall=[round(share, 4) for share in answer.recall],
                **asdict(answer.costs),
            )
        )
    return records


def _key_means(settings: Settings, loaded: LoadedModel) -> KeyMeans | None:
    """None where the model has none: methods that want them then say so."""
    folder = settings.predictors or Path(settings.model_path) / "predictors"
    try:
        return KeyMeans.load(folder, loaded.fingerprint)
    except KeyMeansError:
        return None


def _read(file: Path | None, identity: dict[str, Any]) -> list[Record]:
    if file is None or not file.exists():
        return []
    try:
        found = json.loads(file.read_text())
        records = [Record(**record) for record in found.pop("records")]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} holds no records of a comparison: {error}") from error
    if found != identity:
        raise ValueError(f"{file} is of another run ({found}, this is {identity}); name another file")
    return records


def _write(file: Path, identity: dict[str, Any], records: Sequence[Record]) -> None:
    """Replaced as a whole: an interruption leaves the old file or the new one."""
    lines = ",\n".join(json.dumps(asdict(record)) for record in records)
    head = json.dumps(identity)[:-1]
    draft = file.with_name(file.name + ".part")
    draft.write_text(f'{head}, "records": [\n{lines}\n]}}\n')
    os.replace(draft, file)
