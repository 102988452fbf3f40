"""The codec in kernels and its plain twin, on a tiny geometry with planted predictors. Imports Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from aquifer.compression.aqua import AquaCodec
from aquifer.compression.fused import FusedAquaCodec
from aquifer.compression.predictors import LayerFit, PredictorCard, Predictors
from aquifer.compression.spec import KVSpec

# The interpreter truncates to bfloat16 where a device rounds.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16
SPEC = KVSpec(num_layers=3, num_kv_heads=2, head_dim=64, dtype=DTYPE, rope="{}")
C = SPEC.channels
COUNTS = [2, 4, 3]
NAMES = ("aqua:2", "higgs:3", "aqua:3:int8")
"""A codec that predicts, one that does not, and one that predicts in integers."""


def planted_predictors(generator: torch.Generator) -> Predictors:
    def weights() -> Tensor:
        shape = (SPEC.num_layers - 1, 2 * C, C)
        return (torch.randn(shape, generator=generator) * 0.6 * C**-0.5).bfloat16()

    def biases() -> Tensor:
        return torch.randn(SPEC.num_layers - 1, C, generator=generator)

    fits = [LayerFit(layer, 0.1, 0.1, 0.5, 0.5, 2.0, 2.0) for layer in range(SPEC.num_layers)]
    card = PredictorCard("planted", "none", 0, 0, 0.0, 2, fits)
    return Predictors(torch.zeros(C), torch.ones(C), weights(), biases(), weights(), biases(), card)


def codec_pair(name: str, device: torch.device) -> tuple[FusedAquaCodec, AquaCodec]:
    family, bits, *int8 = name.split(":")
    predictors = planted_predictors(torch.Generator().manual_seed(2)) if family == "aqua" else None
    fused, plain = (
        kind(SPEC, int(bits), predictors, device=device, codec_dtype=DTYPE, int8=bool(int8))
        for kind in (FusedAquaCodec, AquaCodec)
    )
    assert isinstance(fused, FusedAquaCodec)
    return fused, plain


def kv(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys and values [L, T, C]."""
    shape = (2, SPEC.num_layers, tokens, C)
    keys, values = (2 * torch.randn(shape, generator=torch.Generator().manual_seed(tokens))).to(device, DTYPE)
    return keys, values


def layers_of(codec: AquaCodec, segments: list[Tensor], counts: list[int]) -> Tensor:
    """[L, 2, T, C]"""
    decoder = codec.decoder(counts, segments[0].device)
    sizes = [[codec.layer_bytes(layer, n) for layer in range(SPEC.num_layers)] for n in counts]
    by_layer = zip(*(s.split(size) for s, size in zip(segments, sizes, strict=True)), strict=True)
    return torch.stack([torch.stack(decoder.decode_layer(slices)) for slices in by_layer])
