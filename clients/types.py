"""What a server answers, as frozen dataclasses. Times are seconds, sizes bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

FinishReason = Literal["length", "eos_token", "stop_sequence", "cancelled"]


@dataclass(frozen=True)
class Token:
    """One generated token. logprob: None where the server knows none."""

    id: int
    text: str
    logprob: float | None
    special: bool


@dataclass(frozen=True)
class CachedTokens:
    """Prompt tokens that were not computed, by the tier they came from."""

    gpu: int
    ram: int
    redis: int

    @property
    def total(self) -> int:
        return self.gpu + self.ram + self.redis


@dataclass(frozen=True)
class KVUsage:
    """What the prompt's KV takes: raw_bytes uncompressed, stored_bytes in the tiers."""

    mode: str
    codec: str
    raw_bytes: int
    stored_bytes: int
    bits_per_value: float | None


@dataclass(frozen=True)
class Drafts:
    """What mode `verified` did. checks: passes over the whole cache."""

    drafted: int
    accepted: int
    checks: int


@dataclass(frozen=True)
class Timings:
    """Seconds. ttft_seconds counts from the end of tokenization to the first token."""

    tokenize_seconds: float
    queue_seconds: float
    restore_seconds: float
    prefill_seconds: float
    ttft_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Answer:
    """A whole answer. tokens: empty when the answer was streamed. drafts: of mode `verified` only."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: CachedTokens
    kv: KVUsage
    timings: Timings
    seed: int | None
    drafts: Drafts | None = None
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Progress:
    """Prompt tokens that are read, of all."""

    done_tokens: int
    total_tokens: int


StreamItem = Progress | Token | Answer


@dataclass(frozen=True)
class Document:
    """State of a document. created, expires: Unix time."""

    document_id: str
    status: Literal["queued", "reading", "ready", "failed"]
    progress: float
    tokens: int
    pinned: bool
    created: float
    expires: float | None
    error: str | None
    raw_bytes: int | None
    stored_bytes: int | None
    bits_per_value: float | None


@dataclass(frozen=True)
class Info:
    """What is served, and within which limits. raw: everything the server said."""

    model: str
    codec: str
    device: str
    dtype: str
    max_prompt_tokens: int
    max_total_tokens: int
    version: str
    raw: Mapping[str, Any]


@dataclass(frozen=True)
class Readiness:
    """Whether requests are served; tiers maps a tier's name to "up" or "down"."""

    ready: bool
    degraded: bool
    model: str
    tiers: Mapping[str, str]


def answer_from(generated_text: str, details: Mapping[str, Any]) -> Answer:
    return Answer(
        text=generated_text,
        finish_reason=details["finish_reason"],
        prompt_tokens=details["prompt_tokens"],
        generated_tokens=details["generated_tokens"],
        cached_tokens=CachedTokens(**details["cached_tokens"]),
        kv=KVUsage(**details["kv"]),
        timings=Timings(**details["timings"]),
        seed=details["seed"],
        drafts=Drafts(**details["drafts"]) if details["drafts"] else None,
        tokens=tuple(Token(**token) for token in details.get("tokens", ())),
    )


def info_from(raw: Mapping[str, Any]) -> Info:
    return Info(
        model=raw["model_id"],
        codec=raw["codec"],
        device=raw["model_device_type"],
        dtype=raw["model_dtype"],
        max_prompt_tokens=raw["max_input_tokens"],
        max_total_tokens=raw["max_total_tokens"],
        version=raw["version"],
        raw=raw,
    )


def readiness_from(raw: Mapping[str, Any]) -> Readiness:
    return Readiness(raw["ready"], raw["degraded"], raw["model"], raw["tiers"])
