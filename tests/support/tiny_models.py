"""Tiny random checkpoints of every supported family, and engines over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from devices import DEVICE
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from aquifer.cachestore.arena import RamArena
from aquifer.cachestore.store import TieredStore
from aquifer.compression.codec import make_codec
from aquifer.compression.landmarks import TokenCodec
from aquifer.compression.raw import RawCodec
from aquifer.compression.wire import verify
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.gate import LoadGate
from aquifer.server.engine.host_memory import lock_for
from aquifer.server.engine.index import IndexPool
from aquifer.server.engine.pages import PagePool
from aquifer.server.engine.parts import EngineLimits, EngineParts
from aquifer.server.engine.records import slot_bytes
from aquifer.server.engine.types import EngineInfo
from aquifer.server.metrics import Metrics
from aquifer.server.models.adapter import DecoderAdapter

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "eos_token_id": 299,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama3-rope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "qwen3-yarn": (Qwen3Config, Qwen3ForCausalLM, {"rope_parameters": YARN_ROPE}),
    "qwen3-moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
}


def tiny_model(family: str, **shape: Any) -> PreTrainedModel:
    """A random model in float32, with weights large enough that its tokens differ from one another. shape:
    where it is not SHAPE."""
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SHAPE, **extra, **shape}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model.to(DEVICE).eval()


def build(model: PreTrainedModel, codec_name: str = "raw", **options: Any) -> Engine:
    """An engine over a model in memory. options: pages, index_pages, slots, keep, chunk_tokens, max_running,
    redis, refuse_when_full, streamed_bytes, staging_bytes, shared_selection."""
    adapter = DecoderAdapter(model, max_tokens=4096)
    codec = make_codec(codec_name, adapter.spec, device=DEVICE, codec_dtype=torch.float32)
    raw = RawCodec(adapter.spec)
    arena = RamArena(options.get("slots", 256) * (slot_bytes(codec, raw) + 4096), slot_bytes(codec, raw))
    keep = options.get("keep", True)
    pool_bytes = options.get("pages", 64) * 256 * adapter.spec.bytes_per_token
    pool = PagePool(adapter.spec, pool_bytes, DEVICE, keep=keep)
    token_codec = TokenCodec(adapter.spec, None, DEVICE)
    index = IndexPool(token_codec, options.get("index_pages", 64), DEVICE, keep=keep)
    info = EngineInfo(
        model="tiny",
        model_fingerprint="tiny",
        codec=codec.name,
        codec_fingerprint=codec.fingerprint,
        codec_note=None,
        device=str(DEVICE),
        dtype="float32",
        max_prompt_tokens=4000,
        max_total_tokens=4096,
        segment_tokens=256,
        device_kv_bytes=pool.num_pages * pool.page_bytes,
        vocab_size=adapter.vocab_size,
        eos_token_ids=(299,),
    )
    # As in the service: what copies from host memory on a device relies on it.
    unlock = lock_for(DEVICE, [torch.frombuffer(arena.buffer, dtype=torch.uint8), index.rows])
    parts = EngineParts(
        adapter=adapter,
        codec=codec,
        raw=raw,
        store=TieredStore(arena, options.get("redis"), verify),
        pool=pool,
        index=index,
        gate=LoadGate(always=True),
        metrics=Metrics(),
        limits=EngineLimits(
            max_running=options.get("max_running", 8),
            max_waiting=64,
            chunk_tokens=options.get("chunk_tokens", 512),
            refuse_when_full=options.get("refuse_when_full", False),
            streamed_bytes=options.get("streamed_bytes", 0),
            staging_bytes=options.get("staging_bytes"),
            shared_selection=options.get("shared_selection", False),
        ),
        eos_token_ids=frozenset(info.eos_token_ids),
    )
    return Engine(parts, info, lambda ids: "".join(chr(0x4E00 + i) for i in ids), unlock)


def greedy_reference(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """What plain `generate` answers. Explicit arguments: a checkpoint's own defaults must not interfere."""
    ids = torch.tensor([list(prompt)], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=299,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()
