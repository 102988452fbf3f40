"""The bodies of requests and answers. Shapes follow TGI's; what is ours stands beside them.

Types are strict ("5" is not 5), numbers are bounded, unknown fields are refused: a typo in a
parameter must not change an answer in silence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from aquifer.server.document_records import ID_PATTERN, DocumentStatus
from aquifer.server.engine.types import FinishReason, KVMode
from aquifer.server.routes.errors import Problem

Text = Annotated[str, Field(min_length=1)]
Salt = Annotated[str, Field(max_length=256)]
DocumentId = Annotated[str, Field(pattern=ID_PATTERN)]
# Known to TGI's clients and not supported here, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "typical_p": (None, 1.0),
    "watermark": (None, False),
    "decoder_input_details": (None, False),
    "top_n_tokens": (None, 0),
    "grammar": (None,),
    "adapter_id": (None,),
    "frequency_penalty": (None, 0.0),
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Parameters(_Body):
    """How the next token is chosen and what is reported.

    Greedy unless sampling is asked for: by `do_sample`, or by a temperature, top_k or top_p while
    `do_sample` is not given. A temperature of 0 is always greedy.
    """

    max_new_tokens: int | None = Field(
        default=None, ge=1, le=1 << 20, description="default: the server's setting"
    )
    do_sample: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=0, le=1 << 20, description="0 or null: every token")
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100, allow_inf_nan=False)
    seed: int | None = Field(
        default=None, ge=0, lt=1 << 63, description="drawn and reported when sampling without"
    )
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        default_factory=list, max_length=16
    )
    truncate: int | None = Field(
        default=None, ge=1, le=1 << 30, description="keep the last N tokens of `inputs`"
    )
    return_full_text: bool | None = Field(default=None, description="begin generated_text with `inputs`")
    details: bool = True
    best_of: int | None = Field(default=None, description="not supported")
    typical_p: float | None = Field(default=None, description="not supported")
    watermark: bool | None = Field(default=None, description="not supported")
    decoder_input_details: bool | None = Field(default=None, description="not supported")
    top_n_tokens: int | None = Field(default=None, description="not supported")
    grammar: dict[str, Any] | None = Field(default=None, description="not supported")
    adapter_id: str | None = Field(default=None, description="not supported")
    frequency_penalty: float | None = Field(default=None, description="not supported")

    @field_validator(*_UNSUPPORTED)
    @classmethod
    def _must_ask_for_nothing(cls, value: Any, info: Any) -> Any:
        if value not in _UNSUPPORTED[info.field_name]:
            raise ValueError("this parameter is not supported; leave it out")
        return value

    @property
    def sampled(self) -> bool:
        if self.temperature == 0:
            return False
        if self.do_sample is not None:
            return self.do_sample
        return any(value is not None for value in (self.temperature, self.top_k or None, self.top_p))


class KVOptions(_Body):
    mode: KVMode = "auto"
    budget: float | None = Field(
        default=None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="share of the prompt that selective attention reads; default: the server's setting",
    )


class GenerateBody(_Body):
    """A question, and the document it is about: as text, or by the id of one read before."""

    inputs: Text
    document: Text | None = None
    document_id: DocumentId | None = None
    parameters: Parameters = Parameters()
    kv: KVOptions = KVOptions()
    cache_salt: Salt | None = Field(default=None, description="requests with different salts share no cache")
    stream: bool = False
    stream_progress: bool = Field(default=False, description="progress events while the prompt is being read")

    @field_validator("parameters", "kv", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _one_document(self) -> GenerateBody:
        if self.document is not None and self.document_id is not None:
            raise ValueError("give document or document_id, not both")
        return self


class DocumentBody(_Body):
    """A document to be read and kept: as text, or as the tokens of it."""

    document: Text | None = None
    token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    document_id: DocumentId | None = Field(default=None, description="generated when absent")
    pin: bool = Field(default=False, description="keep it in RAM here until it is deleted or expires")
    ttl_seconds: float | None = Field(default=None, gt=0, le=10 * 365 * 86400, allow_inf_nan=False)
    wait: bool = Field(default=False, description="answer when the document is read")
    cache_salt: Salt | None = None

    @model_validator(mode="after")
    def _one_source(self) -> DocumentBody:
        if (self.document is None) == (self.token_ids is None):
            raise ValueError("give document or token_ids, one of them")
        return self


class TokenizeBody(_Body):
    inputs: Text


class TokenOut(BaseModel):
    id: int
    text: str
    logprob: float | None
    special: bool


class CachedOut(BaseModel):
    gpu: int
    ram: int
    redis: int


class KVOut(BaseModel):
    mode: str
    codec: str
    raw_bytes: int
    stored_bytes: int
    bits_per_value: float | None


class TimingsOut(BaseModel):
    """Seconds. ttft_seconds counts from submission, after tokenization."""

    tokenize_seconds: float
    queue_seconds: float
    restore_seconds: float
    prefill_seconds: float
    ttft_seconds: float
    decode_seconds: float


class DraftsOut(BaseModel):
    """What mode `verified` did. checks: passes over the whole cache."""

    drafted: int
    accepted: int
    checks: int


class StreamDetails(BaseModel):
    finish_reason: FinishReason
    generated_tokens: int
    prompt_tokens: int
    cached_tokens: CachedOut
    kv: KVOut
    drafts: DraftsOut | None
    timings: TimingsOut
    seed: int | None


class Details(StreamDetails):
    prefill: list[TokenOut] = Field(description="always empty; TGI's clients expect it")
    tokens: list[TokenOut]


class GenerateAnswer(BaseModel):
    generated_text: str
    details: Details | None = None


class StreamEvent(BaseModel):
    """One token of a stream. The last one carries generated_text and details."""

    index: int
    token: TokenOut
    generated_text: str | None
    details: StreamDetails | None


class ReadingProgress(BaseModel):
    done_tokens: int
    total_tokens: int


def _as_json_text(schema: dict[str, Any]) -> None:
    inner = dict(schema)
    schema.clear()
    schema.update(type="string", contentMediaType="application/json", contentSchema=inner)


class ServerSentEvent(BaseModel):
    """One event of a stream, for the OpenAPI page: `progress` events have ReadingProgress, the others a
    token, or a problem when the answer broke off."""

    event: Literal["message", "progress"] = "message"
    data: StreamEvent | ReadingProgress | Problem = Field(json_schema_extra=_as_json_text)


class DocumentOut(BaseModel):
    document_id: str
    status: DocumentStatus
    progress: float = Field(description="0 to 1")
    tokens: int
    pinned: bool
    created: float = Field(description="Unix time, seconds")
    expires: float | None = Field(description="Unix time, seconds; null: never")
    error: str | None
    raw_bytes: int | None = Field(description="null until ready, as the next two")
    stored_bytes: int | None
    bits_per_value: float | None


class DocumentList(BaseModel):
    documents: list[DocumentOut]


class DocumentDeleted(BaseModel):
    document_id: str
    deleted_segments: int


class TokenPlace(BaseModel):
    id: int
    text: str
    start: int
    stop: int


class Info(BaseModel):
    model_id: str
    model_sha: str
    model_dtype: str
    model_device_type: str
    codec: str
    codec_fingerprint: str
    codec_note: str | None
    max_concurrent_requests: int
    max_input_tokens: int
    max_total_tokens: int
    max_body_bytes: int
    segment_tokens: int
    device_kv_bytes: int
    vocab_size: int
    kv_modes: list[str]
    version: str


class Health(BaseModel):
    status: Literal["ok"]


class Ready(BaseModel):
    """`tiers` maps a tier's name to "up" or "down"; a tier that is down costs speed, not answers."""

    ready: bool
    degraded: bool
    model: str
    codec: str
    codec_note: str | None
    running: int
    waiting: int
    tiers: dict[str, Literal["up", "down"]]
