"""Walks the layers of a Hugging Face decoder and hands attention to the caller.

The model's own submodules do all arithmetic (norms, projections, optional q/k norms, MLP or MoE
block, rotary module), so new checkpoints of a family need nothing here; what the walk adds is the
keys before RoPE, which is what gets compressed, and one place for attention.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor
from transformers import PreTrainedModel

from aquifer.compression.spec import KVSpec
from aquifer.kernels.rope import apply_rope

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [N, Hq, D], k before RoPE [N, H, D], k [N, H, D], v [N, H, D]) -> [N, Hq, D]"""


class UnsupportedModelError(ValueError):
    """The checkpoint cannot be served exactly; the message names the reason and the way out."""


class DecoderAdapter:
    """One loaded decoder. N tokens of any mixture of requests go through it as one flat batch."""

    def __init__(self, model: PreTrainedModel, *, max_tokens: int) -> None:
        """max_tokens: the longest sequence that will be served; a window below it is refused."""
        check_supported(model.config, max_tokens)
        self._model = model.eval()
        self._body: Any = model.get_decoder()  # Any: families differ, submodules are found by name
        config = model.config
        self.num_q_heads: int = config.num_attention_heads
        self.vocab_size: int = config.vocab_size
        attention = self._body.layers[0].self_attn
        self.device: torch.device = attention.k_proj.weight.device
        self.spec = KVSpec(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            dtype=attention.k_proj.weight.dtype,
            rope=json.dumps(dict(config.rope_parameters), sort_keys=True, default=float),
        )

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run all layers over N tokens.

        token_ids, positions: [N] int64. attend is called once per layer, in order, and must store
        the new keys and values itself.
        Returns hidden states [N, hidden] before the final norm.
        """
        num_tokens = token_ids.shape[0]
        cos, sin = self.rope_table(positions)
        # The leading 1 is the batch dimension that MoE blocks insist on.
        hidden = self._body.embed_tokens(token_ids)[None]
        for index, layer in enumerate(self._body.layers):
            attention = layer.self_attn
            x = layer.input_layernorm(hidden)
            q = attention.q_proj(x).view(num_tokens, self.num_q_heads, self.spec.head_dim)
            k_pre = attention.k_proj(x).view(num_tokens, self.spec.num_kv_heads, self.spec.head_dim)
            v = attention.v_proj(x).view(num_tokens, self.spec.num_kv_heads, self.spec.head_dim)
            if hasattr(attention, "q_norm"):
                q, k_pre = attention.q_norm(q), attention.k_norm(k_pre)
            out = attend(index, apply_rope(q, cos, sin), k_pre, apply_rope(k_pre, cos, sin), v)
            hidden = hidden + attention.o_proj(out.reshape(1, num_tokens, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden[0]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [N, hidden] as `forward` returned it. Returns [N, vocab] float32."""
        return self._model.get_output_embeddings()(self._body.norm(hidden)).float()

    @torch.inference_mode()
    def rope_table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [N] int64. Returns cos and sin, [N, D] each, in the model's dtype."""
        like = torch.empty(0, dtype=self.spec.dtype, device=self.device)
        cos, sin = self._body.rotary_emb(like, positions[None])
        return cos[0], sin[0]

    def weight_bytes(self) -> int:
        """Bytes of the weights on the device; tied tensors count once."""
        return sum(p.numel() * p.element_size() for p in self._model.parameters())


def checkpoint_fingerprint(model: PreTrainedModel, folder: Path) -> str:
    """Digest of a checkpoint's weight files and of its config: what a cached KV depends on. Hex.

    The files, not the loaded tensors: predictors made on a GPU in bfloat16 must fit the same checkpoint
    loaded in float32 (the dtype in use is part of the codec's fingerprint). Raises FileNotFoundError
    when the folder holds no weights.
    """
    config = model.config.to_dict()
    for cosmetic in ("_name_or_path", "transformers_version", "dtype", "architectures", "use_cache"):
        config.pop(cosmetic, None)
    digest = blake3(json.dumps(config, sort_keys=True, default=str).encode(), max_threads=blake3.AUTO)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors")
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        digest.update_mmap(file)
    return str(digest.hexdigest())


def check_supported(config: object, max_tokens: int) -> None:
    """Raise UnsupportedModelError unless every layer is full attention with a fixed RoPE."""
    family = getattr(config, "model_type", "?")
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {family!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "?")
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"RoPE type {rope_type!r} changes with the prompt's length, so cached keys would not stay "
            f"valid; supported: {', '.join(ROPE_TYPES)}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError("partial rotary embeddings are not supported")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < max_tokens:
        raise UnsupportedModelError(
            f"the model attends to a sliding window of {window} tokens, less than the limit of {max_tokens}; "
            f"set AQUIFER_MAX_PROMPT_TOKENS below {window}, or sliding_window to null in config.json if "
            "the checkpoint was trained with full attention"
        )
    # A window at least as long as every prompt is full attention, whatever the layer is called.
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UnsupportedModelError(f"layers of kind {', '.join(sorted(kinds))} are not supported")
