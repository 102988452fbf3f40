"""Quality on context-intensive tasks, answered from the cache that came back from the store.

A run reads every prompt once and stores it, drops what is on the device, and only then asks: so the
answer is made from restored KV, through the same engine that serves. `full` skips the store and is
the yardstick; `raw` goes through the store without loss and shows that the path itself costs nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.server.engine.build import build_engine, load_tokenizer
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.types import FinishedEvent, GenerateRequest, KVMode, SamplingParams
from aquifer.server.metrics import Metrics
from aquifer.server.settings import Settings
from aquifer.server.tokenization import Tokenizer
from aquifer.workloads.registry import MAKERS, SCORERS
from aquifer.workloads.scoring import is_scoreable
from aquifer.workloads.tasks import Sample, read_samples, token_counter

EvalTask = Literal["text2json", "needles", "table", "perplexity"]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many samples are finished, and of how many."""

_ANSWER_MARGIN = 1.5
"""Room for an answer, relative to the expected one: a model that does not stop must be seen failing."""


@dataclass(frozen=True)
class EvalPlan:
    """What to measure. data: a JSON Lines file with `problem` and `answer` instead of generated samples.
    tokens: prompt length of generated samples. batch: prompts that are on the device together.
    mode, budget: how answers are decoded, as in a request; `perplexity` reads the whole cache in any mode."""

    task: EvalTask
    kv: str
    tokens: int = 4096
    samples: int = 50
    seed: int = 1
    data: Path | None = None
    batch: int = 16
    chat: bool = False
    mode: KVMode = "resident"
    budget: float | None = None


@dataclass(frozen=True)
class EvalResult:
    """score: 0..100 (tasks with generated answers). nll: mean negative log likelihood of the expected
    answers' tokens, in nats (perplexity). mode: how the answers were decoded.
    bits_per_value: of the KV the answers were made from.
    restored_tokens: prompt tokens that came from the store, all samples together.
    accepted_drafts: share of the drafted tokens (mode verified).
    checks_per_token: passes over the whole cache per generated token (mode verified).
    """

    task: str
    kv: str
    mode: str
    model: str
    device: str
    samples: int
    seed: int
    score: float | None
    nll: float | None
    bits_per_value: float
    prompt_tokens: int
    restored_tokens: int
    generated_tokens: int
    accepted_drafts: float | None
    checks_per_token: float | None
    sample_scores: list[float]


@dataclass(frozen=True)
class Item:
    """One question: prompt tokens, the expected answer, and that answer's tokens with the end."""

    prompt: tuple[int, ...]
    answer: str
    answer_ids: tuple[int, ...]


def evaluate(plan: EvalPlan, settings: Settings, progress: Progress) -> EvalResult:
    """Run one evaluation. settings: model, device, predictors; the codec is set by plan.kv.

    Raises ValueError for an unknown codec, a model that cannot be served, or data without usable answers.
    """
    tokenizer = load_tokenizer(settings)
    items = load_items(plan, tokenizer, settings)
    longest = max(len(item.prompt) + answer_room(item) for item in items)
    settings = settings.model_copy(
        update={
            "codec": "raw" if plan.kv == "full" else plan.kv,
            "gpu_cache": False,
            "load_gate": "always",
            "redis_url": None,
            "max_running_requests": plan.batch,
            "max_prompt_tokens": max(longest, settings.max_prompt_tokens),
        }
    )
    engine = build_engine(settings, Metrics())
    try:
        finished = list(_answer(engine, plan, items, progress))
    finally:
        engine.close()
    return _result(plan, settings, engine, items, finished)


def load_items(plan: EvalPlan, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[Item]:
    """The questions of a plan, tokenized. Raises ValueError if there are none."""
    samples = itertools.islice(_samples(plan, tokenizer), plan.samples)
    prompts = Tokenizer(tokenizer, max(settings.max_prompt_tokens, plan.tokens))
    eos = (tokenizer.eos_token_id,)

    async def tokenized() -> list[Item]:
        items = []
        for sample in samples:
            if plan.chat:
                text = tokenizer.apply_chat_template(
                    [{"role": "user", "content": sample.document + sample.inputs}],
                    tokenize=False,
                    add_generation_prompt=True,
                )
                bos = tokenizer.bos_token or ""
                ids = await prompts.prompt(str(text).removeprefix(bos))
            else:
                ids = await prompts.prompt(sample.inputs, sample.document)
            answer_ids = tokenizer.encode(sample.answer, add_special_tokens=False)
            items.append(Item(tuple(ids), sample.answer, (*answer_ids, *eos)))
        return items

    try:
        items = asyncio.run(tokenized())
    finally:
        prompts.close()
    if not items:
        raise ValueError(f"no usable samples in {plan.data or 'the generator'}")
    return items


def _samples(plan: EvalPlan, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sample]:
    if plan.data is not None:
        yield from (sample for sample in read_samples(plan.data) if is_scoreable(sample.answer))
        return
    make = MAKERS["text2json" if plan.task == "perplexity" else plan.task]
    count_tokens = token_counter(tokenizer)
    for seed in itertools.count(plan.seed * 100_000):
        yield make(seed, plan.tokens, count_tokens, "heldout")


def answer_room(item: Item) -> int:
    """Tokens a model may generate before it is cut off."""
    return int(len(item.answer_ids) * _ANSWER_MARGIN) + 32


def _answer(
    engine: Engine, plan: EvalPlan, items: Sequence[Item], progress: Progress
) -> Iterator[FinishedEvent]:
    """Store each batch, then ask about it; events in the order of the items."""
    for start in range(0, len(items), plan.batch):
        batch = items[start : start + plan.batch]
        if plan.kv != "full":
            progress("storing", start, len(items))
            stores = [_request(f"store-{n}", item, plan, room=0) for n, item in enumerate(batch, start)]
            engine.generate(stores)
            if not engine.flush(timeout=600):
                raise RuntimeError("the store did not take the batch within ten minutes")
        progress("answering", start, len(items))
        asked = [
            _request(f"ask-{n}", item, plan, room=answer_room(item), score=plan.task == "perplexity")
            for n, item in enumerate(batch, start)
        ]
        finished = engine.generate(asked)
        for item, event in zip(batch, finished, strict=True):
            expected = 0 if plan.kv == "full" else (len(item.prompt) - 1) // SEGMENT_TOKENS * SEGMENT_TOKENS
            if event.cached.total != expected:
                raise RuntimeError(
                    f"{event.cached.total} tokens came from the store instead of {expected}: "
                    "the RAM arena is too small for a batch (--batch, AQUIFER_RAM_BYTES)"
                )
        yield from finished
        if plan.kv != "full":
            for item in batch:
                engine.forget(item.prompt, "")
    progress("done", len(items), len(items))


def _request(name: str, item: Item, plan: EvalPlan, *, room: int, score: bool = False) -> GenerateRequest:
    return GenerateRequest(
        request_id=name,
        token_ids=item.prompt,
        sampling=SamplingParams(max_new_tokens=0 if score else room),
        score_ids=item.answer_ids if score else (),
        store=room == 0,
        mode=plan.mode if room else "resident",
        budget=plan.budget,
    )


def _result(
    plan: EvalPlan,
    settings: Settings,
    engine: Engine,
    items: Sequence[Item],
    finished: Sequence[FinishedEvent],
) -> EvalResult:
    score = nll = None
    if plan.task == "perplexity":
        scores = [-sum(event.score_logprobs) / len(event.score_logprobs) for event in finished]
        nll = -sum(sum(event.score_logprobs) for event in finished) / sum(len(i.answer_ids) for i in items)
    else:
        judge = SCORERS[plan.task]
        scores = [judge(event.text, item.answer) for event, item in zip(finished, items, strict=True)]
        score = 100 * sum(scores) / len(scores)
    stored = sum(event.kv.stored_bytes for event in finished)
    raw = sum(event.kv.raw_bytes for event in finished)
    drafts = [event.drafts for event in finished if event.drafts]
    drafted = sum(counts.drafted for counts in drafts)
    generated = sum(event.generated_tokens for event in finished)
    raw_bits = 32 if engine.info.dtype == "float32" else 16
    return EvalResult(
        task=plan.task,
        kv=plan.kv,
        mode=finished[0].kv.mode,
        model=settings.model,
        device=engine.info.device,
        samples=len(items),
        seed=plan.seed,
        score=score,
        nll=nll,
        bits_per_value=raw_bits if plan.kv == "full" or not raw else raw_bits * stored / raw,
        prompt_tokens=sum(event.prompt_tokens for event in finished),
        restored_tokens=sum(event.cached.total for event in finished),
        generated_tokens=generated,
        accepted_drafts=sum(counts.accepted for counts in drafts) / drafted if drafted else None,
        checks_per_token=sum(counts.checks for counts in drafts) / generated if drafts else None,
        sample_scores=scores,
    )


def write_json(result: EvalResult, path: Path) -> None:
    path.write_text(json.dumps(asdict(result), indent=2) + "\n")
