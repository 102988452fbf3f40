"""Walks the layers of a Hugging Face decoder and hands attention to the caller.

The model's own submodules do all arithmetic (norms, projections, optional q/k norms, MLP or MoE
block, rotary module), so new checkpoints of a family need nothing here; what the walk adds is the
keys before RoPE, which is what gets compressed, and one place for attention. On a GPU, modules that
are what a fused kernel implements give way to it (layers.py).
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
from aquifer.kernels.backend import Backend, backend_for
from aquifer.kernels.rope import apply_rope
from aquifer.server.models.layers import fused_layer, fused_norm, plain_layer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [N, Hq, D], k before RoPE [N, H, D], k [N, H, D], v [N, H, D]) -> [N, Hq, D]"""

Rotate = Callable[[int, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, q, k, v, cos [N, D], sin [N, D]) -> q and k after RoPE"""


class UnsupportedModelError(ValueError):
    """The checkpoint cannot be served exactly; the message names the reason and the way out."""


class DecoderAdapter:
    """One loaded decoder. N tokens of any mixture of requests go through it as one flat batch."""

    def __init__(self, model: PreTrainedModel, *, max_tokens: int, backend: Backend | None = None) -> None:
        """max_tokens: the longest sequence that will be served; a window below it is refused.
        backend: by default what suits the model's device."""
        check_supported(model.config, max_tokens)
        self._model = model.eval()
        self._body: Any = model.get_decoder()  # Any: families differ, submodules are found by name
        config = model.config
        self.num_q_heads: int = config.num_attention_heads
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.max_positions: int = config.max_position_embeddings
        attention = self._body.layers[0].self_attn
        self.device: torch.device = attention.k_proj.weight.device
        self.spec = KVSpec(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            dtype=attention.k_proj.weight.dtype,
            rope=json.dumps(dict(config.rope_parameters), sort_keys=True, default=float),
        )
        self.backend = backend or backend_for(self.device, self.spec.dtype, self.spec.head_dim)
        layers, head_dim = self._body.layers, self.spec.head_dim
        if self.backend.fuses:
            self._layers = [fused_layer(layer, head_dim, self.backend) for layer in layers]
            final_norm = fused_norm(self._body.norm, self.backend)
            self._final_norm: Callable[[Tensor], Tensor] = lambda hidden: final_norm(hidden, None)[0]
        else:
            self._layers = [plain_layer(layer, head_dim) for layer in layers]
            self._final_norm = self._body.norm
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the weights that were joined

    @property
    def graphable(self) -> bool:
        """Whether a step of it can be recorded as a CUDA graph: only of fused layers."""
        return all(layer.graphable for layer in self._layers)

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, positions: Tensor, attend: Attend, rotate: Rotate | None = None
    ) -> Tensor:
        """Run all layers over N tokens.

        token_ids, positions: int [N]. attend is called once per layer, in order. New keys and values must be
        stored by it, or by rotate, which is called before it and applies RoPE.
        Returns hidden states [N, hidden] before the final norm.
        """
        cos, sin = self.rope_table(positions)
        hidden = self._body.embed_tokens(token_ids)[None]
        delta: Tensor | None = None
        for index, layer in enumerate(self._layers):
            x, hidden = layer.input_norm(hidden, delta)
            q, k_pre, v = layer.project(x)
            if rotate is None:
                q, k = apply_rope(q, cos, sin), apply_rope(k_pre, cos, sin)
            else:
                q, k = rotate(index, q, k_pre, v, cos, sin)
            out = attend(index, q, k_pre, k, v)
            x, hidden = layer.middle_norm(hidden, layer.output(out.reshape(1, out.shape[0], -1)))
            delta = layer.mlp(x)
        return (hidden if delta is None else hidden + delta)[0]

    @torch.inference_mode()
    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden: [N, hidden] as `forward` returned it; out: where to write them, or a new tensor.
        Returns [N, vocab] float32."""
        logits: Tensor = self._model.get_output_embeddings()(self._final_norm(hidden))
        return logits.float() if out is None else out.copy_(logits)

    @torch.inference_mode()
    def rope_table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: int [N]. Returns cos and sin, [N, D] each, in the model's dtype."""
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
