"""What crosses the border between the HTTP routes (or the evaluation) and the engine.

A caller builds a `GenerateRequest`, hands it to `Engine.submit` with a sink, and receives events in
this order: any number of `ProgressEvent` while the prompt is being read, any number of `TokenEvent`,
then exactly one `FinishedEvent` or `FailedEvent`. Sinks are called on the engine's thread and must
return at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

KVMode = Literal["auto", "resident", "streamed", "selective", "verified"]
FinishReason = Literal["length", "eos_token", "stop_sequence", "cancelled"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    max_new_tokens: 0 reads (and stores) the prompt only.
    temperature: 0 is greedy; the rest then has no effect, except repetition_penalty.
    top_k: 0 keeps every token. top_p: 1.0 keeps every token.
    seed: the same seed over the same logits draws the same tokens, whatever else is running. In mode
        `verified` the drafts count, too: same distribution, but other tokens once the drafts differ.
    stop: strings that end the text; they are not part of it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt, already tokenized, and what to do with it.

    token_ids: BOS + document + inputs. An array of 32-bit integers is hashed as it lies.
    cache_salt: tenant and request salt; requests with different salts share no segment.
    budget: share of the prompt that selective attention reads, (sinks + tail + selected) / prompt, but
        never fewer than 64 selected tokens; None: the server's default. Matters to `selective`, and to
        `verified` for its drafts.
    score_ids: when given, nothing is sampled: the event that ends the request carries the log
        probability of each of these tokens after the prompt (teacher forcing).
    store: whether the finished segments of this prompt are written to the tiers.
    """

    request_id: str
    token_ids: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    cache_salt: str = ""
    mode: KVMode = "auto"
    budget: float | None = None
    score_ids: tuple[int, ...] = ()
    store: bool = True

    @property
    def prompt_only(self) -> bool:
        """Whether the prompt is only to be read and stored."""
        return self.sampling.max_new_tokens == 0 and not self.score_ids

    @property
    def total_tokens(self) -> int:
        """Prompt and, at its longest, what follows; the last scored token needs no KV."""
        return len(self.token_ids) + (
            len(self.score_ids) - 1 if self.score_ids else self.sampling.max_new_tokens
        )


@dataclass(frozen=True)
class CachedTokens:
    """Prompt tokens that were not computed, by the tier they came from."""

    gpu: int = 0
    ram: int = 0
    redis: int = 0

    @property
    def total(self) -> int:
        return self.gpu + self.ram + self.redis


@dataclass(frozen=True)
class RequestTimings:
    """Seconds. ttft counts from submission to the first token (or the end of a prompt-only request)."""

    queue_seconds: float = 0.0
    restore_seconds: float = 0.0
    prefill_seconds: float = 0.0
    ttft_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class DraftCounts:
    """What speculation did in one answer. accepted: by the checks, maybe beyond the answer's end.
    checks: passes over the whole cache."""

    drafted: int = 0
    accepted: int = 0
    checks: int = 0

    def plus(self, drafted: int, accepted: int) -> DraftCounts:
        """The counts after one more check."""
        return DraftCounts(self.drafted + drafted, self.accepted + accepted, self.checks + 1)


@dataclass(frozen=True)
class KVUsage:
    """What the prompt's KV costs.

    mode: how the answer was decoded.
    raw_bytes: uncompressed size of the stored tokens' KV in the model's dtype.
    stored_bytes: their size in the tiers, scales, headers and sinks counted.
    bits_per_value: None when nothing of the prompt is stored (shorter than one segment).
    """

    mode: str
    codec: str
    raw_bytes: int
    stored_bytes: int
    bits_per_value: float | None


@dataclass(frozen=True)
class ProgressEvent:
    """Prompt tokens whose KV stands on the device, of all prompt tokens."""

    done_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class TokenEvent:
    """One generated token. text: what may be shown now; it lags behind while a stop string could still
    complete or a multi-byte character is unfinished."""

    token_id: int
    text: str
    logprob: float
    special: bool


@dataclass(frozen=True)
class FinishedEvent:
    """The end of a request. tail: text that was held back and belongs to the answer after all.
    text: the whole generated text."""

    reason: FinishReason
    text: str
    tail: str
    prompt_tokens: int
    generated_tokens: int
    computed_tokens: int
    cached: CachedTokens
    timings: RequestTimings
    kv: KVUsage
    seed: int | None
    score_logprobs: tuple[float, ...] = ()
    drafts: DraftCounts | None = None


@dataclass(frozen=True)
class FailedEvent:
    """The request could not be served. kind maps to an HTTP status:
    too_long 413, overloaded 429, shutting_down 503, internal 500."""

    kind: Literal["too_long", "overloaded", "shutting_down", "internal"]
    message: str


Event = ProgressEvent | TokenEvent | FinishedEvent | FailedEvent
Sink = Callable[[Event], None]


@dataclass(frozen=True)
class EngineInfo:
    """Static facts for /info. predictors: None when the codec needs none or runs without."""

    model: str
    model_fingerprint: str
    codec: str
    codec_fingerprint: str
    codec_note: str | None
    device: str
    dtype: str
    max_prompt_tokens: int
    max_total_tokens: int
    segment_tokens: int
    device_kv_bytes: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class EngineLoad:
    """What is going on right now, for /ready and the gauges. device_bytes: by use
    (weights, resident, landmarks, staging)."""

    running: int
    waiting: int
    device_bytes: dict[str, int]
    device_capacity_bytes: int
