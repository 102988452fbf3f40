"""The layer walk computes what the model's own forward computes, and refuses what it could not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import DEVICE, FAMILIES, LLAMA3_ROPE, SHAPE, tiny_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from aquifer.kernels.attention import attend_ref
from aquifer.kernels.backend import PLAIN
from aquifer.server.models.adapter import (
    DecoderAdapter,
    UnsupportedModelError,
    check_supported,
    checkpoint_fingerprint,
)

DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
SHORT_WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1}


def causal(layer: int, q: Tensor, k_pre: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, _ = attend_ref(*(t.transpose(0, 1) for t in (q, k, v)), causal=True)
    return out.transpose(0, 1)


@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_models_own_forward(family: str, fuses: bool) -> None:
    """Fused layers, too; on a CPU those run plain operations."""
    model = tiny_model(family)
    ids = torch.randint(0, 299, (700,), device=DEVICE)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    backend = None if fuses and DEVICE.type == "cuda" else replace(PLAIN, fuses=fuses)
    adapter = DecoderAdapter(model, max_tokens=4096, backend=backend)
    hidden = adapter.forward(ids, torch.arange(700, device=DEVICE), causal)
    torch.testing.assert_close(adapter.logits(hidden), expected, rtol=1e-4, atol=1e-4)
    assert adapter.graphable == (fuses and family != "qwen3-moe")


@pytest.mark.parametrize("bias", ["none", "all", "some"])
def test_fused_weights_are_the_models_own(bias: str) -> None:
    """One copy in memory, and the model's modules go on working with it."""
    model = tiny_model("qwen2")
    attention = model.get_decoder().layers[0].self_attn
    if bias != "all":
        attention.k_proj.bias = None
    if bias == "none":
        attention.q_proj.bias = attention.v_proj.bias = None
    ids = torch.randint(0, 299, (1, 20), device=DEVICE)
    with torch.inference_mode():
        expected = model(ids).logits
        size = DecoderAdapter(model, max_tokens=4096, backend=PLAIN).weight_bytes()
        adapter = DecoderAdapter(model, max_tokens=4096, backend=replace(PLAIN, fuses=True))
        torch.testing.assert_close(model(ids).logits, expected)
        hidden = adapter.forward(ids[0], torch.arange(20, device=DEVICE), causal)
        torch.testing.assert_close(adapter.logits(hidden), expected[0], rtol=1e-4, atol=1e-4)
    assert adapter.weight_bytes() == size
    storages = {attention.get_submodule(f"{n}_proj").weight.untyped_storage().data_ptr() for n in "qkv"}
    assert len(storages) == 1


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3-yarn"])
def test_keys_before_rope_rotate_to_the_models_keys(family: str) -> None:
    """What is stored is before RoPE and after the key norm: rotating it gives the cache's own keys."""
    model = tiny_model(family)
    adapter = DecoderAdapter(model, max_tokens=4096)
    ids = torch.randint(0, 299, (64,), device=DEVICE)
    seen: list[Tensor] = []

    def keep(layer: int, q: Tensor, k_pre: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(k)
        return causal(layer, q, k_pre, k, v)

    adapter.forward(ids, torch.arange(64, device=DEVICE), keep)
    with torch.inference_mode():
        cache = model(ids[None], use_cache=True).past_key_values
    for layer, keys in enumerate(seen):
        torch.testing.assert_close(keys.transpose(0, 1), cache.layers[layer].keys[0], rtol=1e-4, atol=1e-4)


def test_fingerprint_changes_with_weights_and_with_rope_but_not_with_the_dtype_in_use(tmp_path: Path) -> None:
    def fingerprint(name: str, model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> str:
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=dtype)
        return checkpoint_fingerprint(loaded, tmp_path / name)

    plain = tiny_model("llama")
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    first = fingerprint("plain", plain)
    assert first == fingerprint("again", plain) == fingerprint("half", plain, torch.bfloat16)
    assert len({first, fingerprint("other", other), fingerprint("rope", tiny_model("llama3-rope"))}) == 3


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(), "model type 'gpt2'"),
        (
            LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "dynamic",
        ),
        (MistralConfig(**SHAPE), "sliding window of 4096"),
        (
            Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=128, max_window_layers=1),
            "window of 128",
        ),
        (LlamaConfig(**SHAPE, rope_parameters={**LLAMA3_ROPE, "partial_rotary_factor": 0.5}), "partial"),
    ],
)
def test_models_that_cannot_be_cached_exactly_are_refused(config: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        check_supported(config, max_tokens=8192)


def test_a_window_longer_than_every_prompt_is_full_attention() -> None:
    check_supported(MistralConfig(**SHAPE), max_tokens=4096)
