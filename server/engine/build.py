"""From settings to a running engine: model, codec, tiers, device pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from aquifer.cachestore.arena import RamArena
from aquifer.cachestore.redis_link import RedisLink
from aquifer.cachestore.redis_tier import RedisTier
from aquifer.cachestore.store import TieredStore
from aquifer.compression.codec import Codec, make_codec
from aquifer.compression.landmarks import KeyMeans, KeyMeansError, TokenCodec
from aquifer.compression.predictors import Predictors
from aquifer.compression.raw import RawCodec
from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.compression.wire import verify
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.gate import LoadGate
from aquifer.server.engine.host_memory import lock_for
from aquifer.server.engine.index import IndexPool, index_pages
from aquifer.server.engine.pages import PagePool
from aquifer.server.engine.parts import EngineLimits, EngineParts
from aquifer.server.engine.records import slot_bytes
from aquifer.server.engine.types import EngineInfo
from aquifer.server.engine.warmup import warm_up
from aquifer.server.metrics import Metrics
from aquifer.server.models.adapter import DecoderAdapter, checkpoint_fingerprint
from aquifer.server.settings import GIB, Settings

log = structlog.get_logger(__name__)

_CPU_KV_BYTES = 2 * GIB
_CUDA_FREE_SHARE = 0.85
"""Of the memory free after loading: the rest is for activations, logits and the codec's staging."""


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint on its device, ready to be walked."""

    adapter: DecoderAdapter
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    max_total_tokens: int
    eos_token_ids: tuple[int, ...]


def build_engine(settings: Settings, metrics: Metrics, *, warm: bool = False) -> Engine:
    """Load everything and start the engine's thread. Slow: reads the weights.

    warm: on CUDA, do beforehand what the first requests would wait for.
    Raises ValueError (UnsupportedModelError included) or OSError with the reason and the way out.
    """
    loaded = load_model(settings)
    adapter = loaded.adapter
    codec, note = choose_codec(settings, loaded)
    raw = RawCodec(adapter.spec)
    arena = RamArena(settings.ram_bytes, slot_bytes(codec, raw))
    redis = None
    if settings.redis_url:
        redis = RedisTier(
            RedisLink(settings.redis_url, timeout_seconds=settings.redis_timeout_seconds),
            max_record_bytes=slot_bytes(codec, raw),
            ttl_seconds=settings.redis_ttl_seconds,
            connections=settings.redis_connections,
        )
    token_codec, means_note = _token_codec(settings, loaded)
    kv_bytes = _device_kv_bytes(settings, adapter.device)
    landmark_bytes = int(kv_bytes * settings.selective_gpu_share)
    num_pages = index_pages(token_codec, settings.selective_ram_bytes, landmark_bytes)
    index = IndexPool(token_codec, num_pages, adapter.device, keep=settings.gpu_cache)
    pool = PagePool(adapter.spec, kv_bytes - index.capacity_bytes, adapter.device, keep=settings.gpu_cache)
    info = EngineInfo(
        model=settings.served_model_name or settings.model,
        model_fingerprint=loaded.fingerprint,
        codec=codec.name,
        codec_fingerprint=codec.fingerprint,
        codec_note="; ".join(filter(None, (note, means_note))) or None,
        device=str(adapter.device),
        dtype=str(adapter.spec.dtype).removeprefix("torch."),
        max_prompt_tokens=min(settings.max_prompt_tokens, loaded.max_total_tokens - 1),
        max_total_tokens=loaded.max_total_tokens,
        segment_tokens=SEGMENT_TOKENS,
        device_kv_bytes=pool.num_pages * pool.page_bytes + index.capacity_bytes,
        vocab_size=adapter.vocab_size,
        eos_token_ids=loaded.eos_token_ids,
    )
    unlock = lock_for(adapter.device, [torch.frombuffer(arena.buffer, dtype=torch.uint8), index.rows])
    parts = EngineParts(
        adapter=adapter,
        codec=codec,
        raw=raw,
        store=TieredStore(arena, redis, verify, write_behind_bytes=settings.redis_queue_bytes),
        pool=pool,
        index=index,
        gate=LoadGate(always=settings.load_gate == "always"),
        metrics=metrics,
        limits=EngineLimits(
            max_running=settings.max_running_requests,
            max_waiting=settings.max_waiting_requests,
            chunk_tokens=settings.prefill_chunk_tokens,
            refuse_when_full=settings.when_full == "refuse",
            streamed_bytes=settings.streamed_gpu_bytes,
            staging_bytes=_staging_bytes(adapter.device),
            selective_budget=settings.selective_budget,
            shared_selection=settings.selective_sets == "layer",
        ),
        eos_token_ids=frozenset(loaded.eos_token_ids),
    )

    def decode_text(ids: Sequence[int]) -> str:
        return str(loaded.tokenizer.decode(list(ids), skip_special_tokens=True))

    if warm and adapter.device.type == "cuda":
        warm_up(parts, info)
    return Engine(parts, info, decode_text, unlock)


def load_model(settings: Settings) -> LoadedModel:
    """Load the checkpoint and its tokenizer, and refuse what cannot be served exactly."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    transformers_logging.disable_progress_bar()
    device = _device(settings)
    dtype = {
        "auto": torch.bfloat16 if device.type == "cuda" else torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[settings.dtype]
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(settings.model_path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"AQUIFER_MODEL={settings.model} could not be loaded: {error}") from error
    max_total = int(model.config.max_position_embeddings)
    limit = min(settings.max_prompt_tokens, max_total)
    model.to(device)  # type: ignore[arg-type]  # transformers' stub forgets torch.device
    adapter = DecoderAdapter(model, max_tokens=limit)
    tokenizer = load_tokenizer(settings)
    # Where transformers found the checkpoint: the folder named, or the hub's snapshot on disk.
    config_file = cached_file(settings.model_path, "config.json")
    fingerprint = checkpoint_fingerprint(model, Path(str(config_file)).parent)
    return LoadedModel(adapter, tokenizer, fingerprint, max_total, _eos_token_ids(model, tokenizer))


def load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(settings.model_path)


def choose_codec(settings: Settings, loaded: LoadedModel) -> tuple[Codec, str | None]:
    """The codec of this process, and a note where it is not the one a user would expect.

    Raises ValueError when an `aqua:*` codec was asked for and no predictors are found that serve it.
    """
    device = loaded.adapter.device
    codec_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name, note = settings.codec, None
    predictors = None
    if name == "auto" or name.startswith("aqua"):
        try:
            predictors = Predictors.load(_predictors_folder(settings), loaded.fingerprint)
            name = "aqua:2" if name == "auto" else name
        except (OSError, ValueError) as error:
            if settings.codec != "auto":
                raise ValueError(f"AQUIFER_CODEC={settings.codec}: {error}") from error
            name = "higgs:4"
            note = f"using higgs:4: {error}"
            log.warning("codec fallback", note=note)
    try:
        codec = make_codec(
            name, loaded.adapter.spec, device=device, codec_dtype=codec_dtype, predictors=predictors
        )
    except ValueError as error:
        raise ValueError(f"AQUIFER_CODEC={settings.codec}: {error}") from error
    return codec, note


def _token_codec(settings: Settings, loaded: LoadedModel) -> tuple[TokenCodec, str | None]:
    """How tokens are kept for selective decoding, and a note if that is without calibrated means."""
    adapter = loaded.adapter
    try:
        means = KeyMeans.load(_predictors_folder(settings), loaded.fingerprint).means
    except (OSError, KeyMeansError) as error:
        return TokenCodec(adapter.spec, None, adapter.device), f"selective decoding without means: {error}"
    return TokenCodec(adapter.spec, means, adapter.device), None


def _predictors_folder(settings: Settings) -> Path:
    return settings.predictors or Path(settings.model_path) / "predictors"


def _device(settings: Settings) -> torch.device:
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("AQUIFER_DEVICE asks for CUDA, but torch finds no device; see `aquifer doctor`")
    return device


def _device_kv_bytes(settings: Settings, device: torch.device) -> int:
    if settings.gpu_kv_bytes:
        return settings.gpu_kv_bytes
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _CUDA_FREE_SHARE)
    return _CPU_KV_BYTES


def _staging_bytes(device: torch.device) -> int:
    """Half of what is free when all pages are there; the rest is for everything else that a step computes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free // 2
    return _CPU_KV_BYTES // 2


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends an answer: Llama 3 has several, spread over these three places."""
    ids: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        ids.update([found] if isinstance(found, int) else found or ())
    return tuple(sorted(ids))
