"""`aquifer bench restore` and `store`: KV on its way between the device and the tiers.

restore: from a prompt's bytes in RAM, or Redis, to KV that is ready in the device's pages, against
         reading the prompt and against copying the uncompressed KV
store:   what storing adds to reading a prompt, against copying the uncompressed KV away
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from time import perf_counter

import torch
from torch import Tensor

from aquifer.benchmarks.engines import (
    QUESTION_TOKENS,
    Needs,
    drop_from_ram,
    engine_for,
    random_kv,
    random_prompt,
    redis_at,
    request,
    timed_read,
    wait_until_stored,
)
from aquifer.benchmarks.geometries import Subject
from aquifer.benchmarks.harness import Contestant, LeftOutError, Report, Row, Run, clocked
from aquifer.benchmarks.peers import hf_prefill, load_hf, raw_copy, taking_part
from aquifer.compression.aqua import AquaCodec
from aquifer.compression.codec import Codec
from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.kernels.prediction import Linear
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.types import FinishedEvent

ENCODE_SEGMENTS = 8
DECODE_SEGMENTS = 32
"""Segments that go through the codec in one pass, as in the engine on a CPU."""


def bench_restore(
    subject: Subject,
    codec: str,
    tokens: int,
    repeat: int,
    peers: Sequence[str],
    redis_url: str | None,
    requests: int = 1,
) -> Report:
    """From the bytes of prompts in a tier to their KV in pages, on the wall, per prompt.

    tokens: whole segments, so that all of a prompt can be restored. Raises ValueError otherwise.
    requests: prompts asked for at once. All else is measured on one of them: among it the first token of an
        answer, with a question of 32 tokens behind the prompt.
    """
    check_whole(tokens)
    report = new_report("restore", subject, codec=codec, tokens=tokens, requests=requests, repeat=repeat)
    device, coder = subject.device, subject.codec(codec)
    prompts = [random_prompt(subject, tokens) for _ in range(requests)]
    stored = _encode(coder, *random_kv(subject, tokens))
    with ExitStack() as stack:
        url = None
        try:
            url = stack.enter_context(redis_at(redis_url))
        except LeftOutError as error:
            report.left_out["from Redis"] = str(error)
        engine = stack.enter_context(engine_for(subject, Needs(codec, tokens, requests, redis_url=url)))
        for prompt in prompts:
            _, stored_event = timed_read(engine, prompt, store=True)
        wait_until_stored(engine, prompts)
        from_ram, first_token = restore_run(engine, prompts, "ram"), _question(subject, engine, prompts[0])
        rows: dict[str, Row] = {}
        # Before others take turns, after which a device's clock may be lower.
        for name, run in (("from RAM, alone", from_ram), ("first token, alone", first_token)):
            rows |= report.measure([Contestant(name, "ours", run)], repeat)
        ours = [Contestant("from RAM", "ours", from_ram)]
        if url:
            ours.append(Contestant("from Redis", "ours", restore_run(engine, prompts, "redis")))
        ours.append(Contestant("first token, from RAM", "ours", first_token))
        codec_alone = clocked(device, lambda: _decode(coder, stored, device))
        prefill = _prefill(subject, engine, tokens, store=False)
        ours += [Contestant("decoding alone", "ours", codec_alone), Contestant("prefill", "ours", prefill)]
        limits = [Contestant("copy of the stored bytes", "limit", _copy_in(stored, device))]
        if isinstance(coder, AquaCodec) and not coder.int8:  # no library's product of int8 is as fast as ours
            limits.append(Contestant("predictor GEMMs", "limit", _predictions(coder, tokens, device)))
        makers: dict[str, Callable[[], Run]] = {
            "hf-dynamic": lambda: hf_prefill(subject, load_hf(subject), tokens),
            "raw-copy": lambda: raw_copy(subject, tokens, to_device=True),
        }
        others = taking_part(report, subject, peers, makers)
        rows |= report.measure([*ours, *others, *limits], repeat)
        for prompt in prompts:
            engine.forget(prompt, "")
    for row in rows.values():
        row.figures["tokens_per_second"] = tokens / row.figures["seconds"]
    for name in rows.keys() & {"from RAM", "from Redis"}:
        rows[name].figures["stored_bytes"] = stored_event.kv.stored_bytes
    report.compare("from RAM")
    return report


def bench_store(subject: Subject, codec: str, tokens: int, repeat: int, peers: Sequence[str]) -> Report:
    """What it costs that a prompt is stored while it is read: until the first token of an answer, and until
    the last record is in RAM.

    Raises ValueError unless the tokens are whole segments.
    """
    check_whole(tokens)
    report = new_report("store", subject, codec=codec, tokens=tokens, repeat=repeat)
    coder = subject.codec(codec)
    keys, values = random_kv(subject, tokens)
    with engine_for(subject, Needs(codec, tokens)) as engine:
        encoding = clocked(subject.device, lambda: _encode(coder, keys, values))
        ours = [
            Contestant("prefill beside storing", "ours", _first_token(subject, engine, tokens, store=True)),
            Contestant("prefill", "ours", _first_token(subject, engine, tokens, store=False)),
            Contestant("prefill and store", "ours", _prefill(subject, engine, tokens, store=True)),
            Contestant("encoding alone", "ours", encoding),
        ]
        makers = {"raw-copy": lambda: raw_copy(subject, tokens, to_device=False)}
        rows = report.measure([*ours, *taking_part(report, subject, peers, makers)], repeat)
    prefill_seconds = rows["prefill"].figures["seconds"]
    for row in rows.values():
        row.figures["tokens_per_second"] = tokens / row.figures["seconds"]
        row.figures["of_prefill_percent"] = 100 * row.figures["seconds"] / prefill_seconds
    report.compare()
    return report


def new_report(benchmark: str, subject: Subject, **setup: str | int | float | None) -> Report:
    """An empty report that says what is measured on what."""
    model: dict[str, str | int | float | None] = {
        "geometry": subject.geometry,
        "layers": subject.spec.num_layers,
        "device": str(subject.device),
        "dtype": str(subject.dtype).removeprefix("torch."),
    }
    return Report(benchmark, {**model, **setup}, notes=subject.notes)


def check_whole(tokens: int) -> None:
    """Raise ValueError unless a prompt is whole segments: only those are stored."""
    if tokens < SEGMENT_TOKENS or tokens % SEGMENT_TOKENS:
        raise ValueError(
            f"tokens must be a multiple of {SEGMENT_TOKENS}, the size of a segment, not {tokens}"
        )


def restore_run(engine: Engine, prompts: Sequence[Sequence[int]], tier: str) -> Run:
    """Bring the KV of stored prompts onto the device, all at once and all from this tier.

    Seconds on the wall, per prompt."""

    def run() -> float:
        if tier == "redis":
            for prompt in prompts:
                drop_from_ram(engine, prompt)
        started = perf_counter()
        events = engine.generate([request(prompt, 0) for prompt in prompts])
        seconds = perf_counter() - started
        for prompt, event in zip(prompts, events, strict=True):
            _check_source(prompt, event, tier)
        return seconds / len(prompts)

    return run


def _check_source(prompt: Sequence[int], event: FinishedEvent, tier: str) -> None:
    """Raise RuntimeError unless all of a prompt came from this tier."""
    if getattr(event.cached, tier) != len(prompt):
        raise RuntimeError(f"{len(prompt)} tokens should have come from {tier}; it was {event.cached}")


def _question(subject: Subject, engine: Engine, prompt: array[int]) -> Run:
    """Ask about a stored prompt: seconds until the first token of an answer, as the engine counts."""

    def run() -> float:
        question = random_prompt(subject, QUESTION_TOKENS)
        (event,) = engine.generate([request(prompt + question, 1, store=False)])
        _check_source(prompt, event, "ram")
        return event.timings.ttft_seconds

    return run


def _prefill(subject: Subject, engine: Engine, tokens: int, *, store: bool) -> Run:
    def run() -> float:
        prompt = random_prompt(subject, tokens)
        seconds, _ = timed_read(engine, prompt, store=store)
        if store:
            engine.forget(prompt, "")
        return seconds

    return run


def _first_token(subject: Subject, engine: Engine, tokens: int, *, store: bool) -> Run:
    def run() -> float:
        prompt = random_prompt(subject, tokens)
        (event,) = engine.generate([request(prompt, 1, store=store)])
        if store:
            wait_until_stored(engine, [prompt])
            engine.forget(prompt, "")
        return event.timings.ttft_seconds

    return run


def _encode(codec: Codec, keys: Tensor, values: Tensor) -> list[Tensor]:
    step = ENCODE_SEGMENTS * SEGMENT_TOKENS
    segments = []
    for some_keys, some_values in zip(keys.split(step, dim=1), values.split(step, dim=1), strict=True):
        counts = [SEGMENT_TOKENS] * (some_keys.shape[1] // SEGMENT_TOKENS)
        segments += codec.encode(some_keys, some_values, counts)
    return segments


def _decode(codec: Codec, segments: Sequence[Tensor], device: torch.device) -> None:
    """Reconstruct all layers of segments that are on the device, and let go of them."""
    sizes = [codec.layer_bytes(layer, SEGMENT_TOKENS) for layer in range(codec.spec.num_layers)]
    for start in range(0, len(segments), DECODE_SEGMENTS):
        group = [segment.split(sizes) for segment in segments[start : start + DECODE_SEGMENTS]]
        decoder = codec.decoder([SEGMENT_TOKENS] * len(group), device)
        for slices in zip(*group, strict=True):
            decoder.decode_layer(slices)


def _copy_in(segments: Sequence[Tensor], device: torch.device) -> Run:
    """One copy of all the segments' bytes from host memory: the least that a restore has to move."""
    source = torch.cat(list(segments)).cpu()
    source = source.pin_memory() if device.type == "cuda" else source
    target = torch.empty_like(source, device=device, pin_memory=False)
    return clocked(device, lambda: target.copy_(source, non_blocking=True))


def _predictions(codec: AquaCodec, tokens: int, device: torch.device) -> Run:
    """The codec's GEMMs alone: the least that a restore has to compute."""
    predictions = [half.prediction for layer in codec.coders for half in layer]
    weights = [linear.weight for linear in predictions if isinstance(linear, Linear)]
    state = torch.randn(tokens, 2 * codec.spec.channels, device=device).to(codec.codec_dtype)
    out = torch.empty(tokens, codec.spec.channels, device=device, dtype=codec.codec_dtype)

    def work() -> None:
        for weight in weights:
            torch.mm(state, weight, out=out)

    return clocked(device, work)
