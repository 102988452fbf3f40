"""The one settings object. Sources, strongest first: command-line flags, AQUIFER_* environment
variables, a YAML file named by AQUIFER_CONFIG, defaults. An unknown key or a bad value stops the
start with a message."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import AliasChoices, Field, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

REFERENCE_MODEL = Path(__file__).parent / "models" / "reference"
MIB = 1 << 20
GIB = 1 << 30

CodecName = Literal[
    "auto",
    "raw",
    "higgs:2",
    "higgs:3",
    "higgs:4",
    "aqua:2",
    "aqua:3",
    "aqua:4",
    "aqua:2:int8",
    "aqua:3:int8",
    "aqua:4:int8",
]


class Settings(BaseSettings):
    """Every knob of the service, typed, with its unit in its name and its reason beside it."""

    model_config = SettingsConfigDict(
        env_prefix="AQUIFER_", frozen=True, extra="forbid", env_ignore_empty=True
    )

    # model
    model: str = Field(
        "reference", description="checkpoint folder or hub name; `reference` is the bundled model"
    )
    served_model_name: str | None = Field(None, description="name shown by /info; default: the model's")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on CUDA, float32 on CPU"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int = Field(0, ge=0, description="CPU threads of the model; 0: one per physical core")

    # codec
    codec: CodecName = Field(
        "auto",
        description="auto: aqua:2 where matching predictors are found, else higgs:4; :int8 predicts in "
        "integers, with which a GPU restores and streams faster and errors rise by 1 to 2 %",
    )
    predictors: Path | None = Field(
        None, description="folder written by `aquifer calibrate`; default: beside the model"
    )

    # limits
    max_prompt_tokens: int = Field(131_072, ge=1, description="longer prompts are refused with 413")
    max_new_tokens: int = Field(256, ge=1, description="default of a request that names none")
    max_running_requests: int = Field(16, ge=1, description="requests that decode together")
    max_waiting_requests: int = Field(256, ge=0, description="beyond it: 429")
    max_body_bytes: int = Field(512 * MIB, ge=1024, description="beyond it: 413")
    prefill_chunk_tokens: int = Field(
        2048, ge=256, multiple_of=256, description="prompt tokens computed between two decode steps"
    )

    # device tier
    gpu_kv_bytes: int = Field(
        0, ge=0, description="device bytes for resident KV; 0: most of the free memory (CUDA) or 2 GiB (CPU)"
    )
    gpu_cache: bool = Field(True, description="keep pages of finished requests on the device until needed")

    when_full: Literal["wait", "refuse"] = Field(
        "wait",
        description="wait: a request for which there is no device memory right now queues; refuse: 429",
    )

    # decoding off the device
    streamed_gpu_bytes: int | None = Field(
        None,
        ge=0,
        description="device bytes that one streamed or verified request fills with segments; "
        "default: half of what is free when it starts",
    )
    selective_ram_bytes: int = Field(
        4 * GIB,
        ge=0,
        description="host memory for the rows that selective and verified requests fetch; 0: neither mode",
    )
    selective_gpu_share: float = Field(
        0.125, ge=0, lt=1, description="of the device bytes for KV, at most, for the landmarks of those rows"
    )
    selective_budget: float = Field(
        0.05, gt=0, le=1, description="share of the prompt that selective attention reads"
    )
    selective_sets: Literal["head", "layer"] = Field(
        "head", description="head: each KV head selects its own tokens; layer: all of a layer share them"
    )

    # RAM and Redis tiers
    ram_bytes: int = Field(4 * GIB, ge=MIB, description="size of the RAM arena")
    redis_url: str | None = Field(
        None,
        validation_alias=AliasChoices("AQUIFER_REDIS_URL", "REDIS_URL", "redis_url"),
        description="redis://, rediss:// or unix://, also from REDIS_URL; empty: no Redis tier",
    )
    redis_ttl_seconds: float = Field(7 * 86400, gt=0, description="a segment unused this long expires")
    redis_timeout_seconds: float = Field(2.0, gt=0, description="socket timeout; a slower answer is a miss")
    redis_connections: int = Field(
        1, ge=1, description="parallel connections for reads; more pay with TLS and over long distances"
    )
    redis_queue_bytes: int = Field(
        512 * MIB, ge=MIB, description="write-behind backlog; beyond it writes are dropped"
    )
    load_gate: Literal["auto", "always"] = Field(
        "auto", description="auto: recompute where loading would be slower; always: load whatever is stored"
    )

    # HTTP
    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535, description="0: any free port")
    api_keys: dict[str, str] = Field(
        default_factory=dict,
        description='JSON object {"key": "tenant"}; if set, all but /health, /ready and /metrics need a key',
    )
    metrics_need_key: bool = Field(False, description="whether /metrics needs a key too")
    ping_seconds: float = Field(15.0, gt=0, description="silence on an event stream before a ping comment")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if value in ("auto", "cpu", "cuda") or (value.startswith("cuda:") and value[5:].isdigit()):
            return value
        raise ValueError(f"device {value!r} is not one of auto, cpu, cuda, cuda:N")

    @field_validator("api_keys")
    @classmethod
    def _tenant_names(cls, value: dict[str, str]) -> dict[str, str]:
        if any(not key or not tenant or "\0" in tenant for key, tenant in value.items()):
            raise ValueError("keys and tenants must not be empty, and a tenant must not contain NUL")
        return value

    @property
    def model_path(self) -> str:
        """What transformers is asked to load."""
        return str(REFERENCE_MODEL) if self.model == "reference" else self.model

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = os.environ.get("AQUIFER_CONFIG")
        yaml_file = (YamlConfigSettingsSource(settings_cls, yaml_file=path),) if path else ()
        return (init_settings, env_settings, *yaml_file)


def load_settings(**flags: Any) -> Settings:
    """Read all sources. Raises ValueError (pydantic's ValidationError included) naming the bad key.

    pydantic-settings ignores unknown environment variables, so a typo in an AQUIFER_* name would be
    silently without effect; that is refused here.
    """
    known = {f"AQUIFER_{name.upper()}" for name in Settings.model_fields}
    # pydantic-settings takes names in capitals or not; the file's is read here, in capitals.
    ours = [name for name in os.environ if name.upper().startswith("AQUIFER_") and name != "AQUIFER_CONFIG"]
    unknown = sorted(name for name in ours if name.upper() not in known)
    if unknown:
        raise ValueError(f"unknown setting {', '.join(unknown)}; `aquifer config` lists the known ones")
    file = os.environ.get("AQUIFER_CONFIG")
    if file and not Path(file).is_file():  # pydantic-settings would go on without it
        raise ValueError(f"AQUIFER_CONFIG names {file}, which is no file")
    given = {name: value for name, value in flags.items() if value is not None}
    if os.environ.get("AQUIFER_REDIS_URL") == "":  # or REDIS_URL, which other programs use, would count
        given.setdefault("redis_url", "")
    try:
        return Settings(**given)
    except yaml.YAMLError as error:
        raise ValueError(f"AQUIFER_CONFIG names {file}, which is no YAML: {error}") from error
