"""The reference model: a small Llama, and a forward pass over its parameters that trains fast.

`LlamaForCausalLM` holds the parameters and is what everybody else loads. Training walks them here with all
tokens of a batch flat, [N, hidden] with N = B*T constant: only attention sees B and T. So torch.compile
runs once, while B and T change from step to step (with Hugging Face's forward: once per length).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from aquifer.workloads.reference.tokenizer import BOS_ID, EOS_ID, PAD_ID

# cuDNN's attention is the fastest on Hopper; the others are for other machines.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


HEAD_DIM = 64
QUERY_HEADS = 8
KV_HEADS = 4
ROPE_THETA = 500_000.0


def reference_config(vocabulary: int, layers: int = 8, hidden: int = 384, mlp: int = 1024) -> LlamaConfig:
    """8 layers x 384, 8 query and 4 KV heads of 64: 15M parameters, 30 MB in bf16."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def new_model(config: LlamaConfig) -> LlamaForCausalLM:
    """Random weights; matrices that write to the residual stream start at zero, which trains faster."""
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


class LayerWeights(NamedTuple):
    attention_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class Weights(NamedTuple):
    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor


def weights_of(model: LlamaForCausalLM) -> Weights:
    layers = [
        LayerWeights(
            layer.input_layernorm.weight,
            layer.self_attn.q_proj.weight,
            layer.self_attn.k_proj.weight,
            layer.self_attn.v_proj.weight,
            layer.self_attn.o_proj.weight,
            layer.post_attention_layernorm.weight,
            layer.mlp.gate_proj.weight,
            layer.mlp.up_proj.weight,
            layer.mlp.down_proj.weight,
        )
        for layer in model.model.layers
    ]
    return Weights(model.model.embed_tokens.weight, layers, model.model.norm.weight)


def rotary_table(positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each [positions, HEAD_DIM] float32."""
    exponents = torch.arange(0, HEAD_DIM, 2, device=device, dtype=torch.float32) / HEAD_DIM
    angles = torch.arange(positions, device=device, dtype=torch.float32)[:, None] * ROPE_THETA**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]).to(x.dtype)


def before_attention(
    x: Tensor, w: LayerWeights, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x: [N, hidden], cos, sin: [N, D]. Returns q [N, Hq, D] and k, v [N, H, D], rotary embedding applied."""
    h = _norm(x, w.attention_norm, eps)
    q, k, v = (_linear(h, matrix).unflatten(-1, (-1, HEAD_DIM)) for matrix in (w.q, w.k, w.v))
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def after_attention(x: Tensor, attended: Tensor, w: LayerWeights, eps: float) -> Tensor:
    """Output projection and MLP, each added to the residual stream. attended: [N, Hq * D]."""
    x = x + _linear(attended, w.o)
    h = _norm(x, w.mlp_norm, eps)
    return x + _linear(F.silu(_linear(h, w.gate)) * _linear(h, w.up), w.down)


def token_losses(x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor, eps: float) -> Tensor:
    """Cross entropy of every token, [N] float32."""
    logits = _linear(_norm(x, norm, eps), embedding)
    return F.cross_entropy(logits.float(), targets, reduction="none")


def causal_attention(q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
    """q: [N, Hq, D], k, v: [N, H, D] with N = rows * T. Returns [N, Hq * D]."""
    q, k, v = (t.unflatten(0, (rows, -1)).transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(_ATTENTION, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


class TrainingForward:
    """Loss of every token. `compile_parts=False` runs the same functions eagerly (CPU, tests)."""

    def __init__(self, model: LlamaForCausalLM, dtype: torch.dtype, compile_parts: bool) -> None:
        self._weights = weights_of(model)
        self._eps: float = model.config.rms_norm_eps
        self._dtype = dtype
        self._before, self._after, self._losses = before_attention, after_attention, token_losses
        if compile_parts:
            self._before = torch.compile(before_attention)
            self._after = torch.compile(after_attention)
            self._losses = torch.compile(token_losses)
        self._rotary: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: [B, T] int64. Returns [B, T] float32; the last column is a loss against padding: ignore it."""
        rows, length = ids.shape
        w, eps = self._weights, self._eps
        if length not in self._rotary:
            cos, sin = rotary_table(length, ids.device)
            self._rotary[length] = cos.repeat(rows, 1), sin.repeat(rows, 1)
        cos, sin = self._rotary[length]
        x = F.embedding(ids.flatten(), w.embedding).to(self._dtype)
        for layer in w.layers:
            q, k, v = self._before(x, layer, cos, sin, eps)
            x = self._after(x, causal_attention(q, k, v, rows), layer, eps)
        targets = ids.roll(-1, dims=1).flatten()
        return self._losses(x, w.norm, w.embedding, targets, eps).view(rows, length)
