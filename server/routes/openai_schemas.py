"""The bodies of OpenAI's dialect. Fields OpenAI does not know are ours or ignored; fields it knows and
this server does not are refused when they ask for something."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from aquifer.server.routes.schemas import DocumentId, KVOptions, Salt, Text

# With the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
}


class StreamOptions(BaseModel):
    include_usage: bool = False


class _Request(BaseModel):
    """What both kinds of completion take. `document`, `document_id`, `kv`, `cache_salt` are this server's."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    model: str | None = Field(default=None, description="as /v1/models lists it, or left out")
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False, description="default: 1")
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=0, le=1 << 20)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    document: Text | None = Field(default=None, description="text before the prompt, cached by itself")
    kv: KVOptions | None = None
    cache_salt: Salt | None = None

    @model_validator(mode="before")
    @classmethod
    def _must_ask_for_nothing(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, neutral in _UNSUPPORTED.items():
                if data.get(name) not in neutral:
                    raise ValueError(f"{name} is not supported; leave it out")
        return data

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(_Request):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 20)
    document_id: DocumentId | None = None

    @property
    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. Parts that are not text are refused."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(_Request):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 20)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1 << 20)
    document_id: None = Field(default=None, description="not supported: a template stands before the text")

    @field_validator("document_id", mode="before")
    @classmethod
    def _no_document_id(cls, value: Any) -> None:
        if value is not None:
            raise ValueError(
                "a chat cannot stand on a document that was read without it; send its text as document"
            )

    @field_validator("messages")
    @classmethod
    def _some_text(cls, value: list[Message]) -> list[Message]:
        if not any(message.text for message in value):
            raise ValueError("no message has any text")
        return value


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


OpenAIFinishReason = Literal["stop", "length"]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: None = None
    finish_reason: OpenAIFinishReason | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: None = None
    finish_reason: OpenAIFinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
