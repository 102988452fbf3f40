"""What a decoder layer computes around attention: by the model's own modules, or with fused operations.

Both are given as a `Layer`, so the walk over the layers is one. Fusing changes results by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from aquifer.kernels.backend import Backend

AddNorm = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(hidden, what is still to be added to it) -> (the norm of the sum, the sum)"""

_SILU = ("silu", "swish")


@dataclass(frozen=True)
class Layer:
    """Hidden states are [1, N, hidden]: MoE blocks insist on a batch dimension.

    project: normed hidden states to q [N, Hq, D], k and v [N, H, D], before RoPE, after head norms.
    output: attention [1, N, Hq*D] to hidden states.
    """

    input_norm: AddNorm
    project: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    output: Callable[[Tensor], Tensor]
    middle_norm: AddNorm
    mlp: Callable[[Tensor], Tensor]
    graphable: bool
    """Whether its kernels are the same whatever the numbers: no routing of tokens to experts."""


def plain_layer(layer: Any, head_dim: int) -> Layer:
    """A layer computed by its own modules."""
    attention = layer.self_attn

    def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
        q, k, v = (part.view(x.shape[1], -1, head_dim) for part in parts)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        return q, k, v

    return Layer(
        input_norm=_own_norm(layer.input_layernorm),
        project=project,
        output=attention.o_proj,
        middle_norm=_own_norm(layer.post_attention_layernorm),
        mlp=layer.mlp,
        graphable=False,
    )


def fused_layer(layer: Any, head_dim: int, backend: Backend) -> Layer:
    """A layer computed with fused operations where its modules are what those implement.

    Weights of products over one input become one tensor, and the modules' own weights views of it.
    """
    attention, mlp = layer.self_attn, layer.mlp
    plain = plain_layer(layer, head_dim)
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    project, feed = plain.project, plain.mlp
    if all(type(module) is nn.Linear for module in projections):
        project = _fused_projection(attention, projections, head_dim, backend)
    gated = all(type(getattr(mlp, name, None)) is nn.Linear for name in ("gate_proj", "up_proj", "down_proj"))
    if gated and getattr(mlp.config, "hidden_act", None) in _SILU:
        feed = _fused_mlp(mlp, backend)
    return Layer(
        input_norm=fused_norm(layer.input_layernorm, backend),
        project=project,
        output=plain.output,
        middle_norm=fused_norm(layer.post_attention_layernorm, backend),
        mlp=feed,
        graphable=gated,
    )


def fused_norm(norm: Any, backend: Backend) -> AddNorm:
    """An RMSNorm and the sum before it in one kernel; any other norm as it is."""
    if not (hasattr(norm, "weight") and hasattr(norm, "variance_epsilon")):
        return _own_norm(norm)
    weight, epsilon = norm.weight, norm.variance_epsilon

    def add_norm(hidden: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        if delta is None:
            return backend.rms_norm(hidden, weight, epsilon), hidden
        return backend.add_rms_norm(delta, hidden, weight, epsilon)

    return add_norm


def _own_norm(norm: Any) -> AddNorm:
    def add_norm(hidden: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        total = hidden if delta is None else hidden + delta
        return norm(total), total

    return add_norm


def _fused_projection(
    attention: Any, projections: Sequence[nn.Linear], head_dim: int, backend: Backend
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    weight, bias = _joined(projections)
    heads = [module.out_features // head_dim for module in projections]
    norms = [
        fused_norm(norm, backend) if norm is not None else None
        for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
    ]

    def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        product = linear(x, weight, bias)[0].unflatten(1, (-1, head_dim))
        q, k, v = product.split(heads, dim=1)
        # The norms' kernel reads whole rows, so heads are copied out of the product for it.
        q, k = (
            part if norm is None else norm(part.contiguous(), None)[0]
            for part, norm in zip((q, k), norms, strict=True)
        )
        return q, k, v

    return project


def _fused_mlp(mlp: Any, backend: Backend) -> Callable[[Tensor], Tensor]:
    weight, bias = _joined([mlp.gate_proj, mlp.up_proj])

    def feed(x: Tensor) -> Tensor:
        gate, up = linear(x[0], weight, bias).chunk(2, dim=1)
        down: Tensor = mlp.down_proj(backend.swiglu(gate, up))
        return down[None]

    return feed


def _joined(modules: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """One weight and one bias of several linear maps. There is one copy: theirs become views of it."""
    weight = torch.cat([module.weight.detach() for module in modules])
    biases = [module.bias.detach() for module in modules if module.bias is not None]
    if biases and len(biases) < len(modules):
        biases = [
            module.weight.new_zeros(module.out_features) if module.bias is None else module.bias.detach()
            for module in modules
        ]
    bias = torch.cat(biases) if biases else None
    first = 0
    for module in modules:
        rows = slice(first, first + module.out_features)
        module.weight = nn.Parameter(weight[rows], requires_grad=False)
        if module.bias is not None and bias is not None:
            module.bias = nn.Parameter(bias[rows], requires_grad=False)
        first = rows.stop
    return weight, bias
