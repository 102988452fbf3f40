"""What the token codec makes of a prompt: landmarks, and rows of 4 bits.

Everything comes through the codec's own `score` and `decode_rows`, so that what is measured here is what the
service would see.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aquifer.compression.landmarks import EncodedTokens, TokenCodec
from aquifer.compression.spec import SINK_TOKENS
from aquifer.workloads.selectors.base import WINDOW_TOKENS, KeyScorer, Prompt, Rows


@dataclass(frozen=True)
class Landmarks:
    """Ranks by 2-bit keys of every token."""

    mean: bool = True
    """Subtract the calibrated channel means before rounding"""
    ends: bool = True
    """Sinks and window have landmarks, too, though they are never chosen: they count in the softmax"""

    def read(self, prompt: Prompt) -> KeyScorer:
        codec = token_codec(prompt, self.mean)
        hidden = (0, 0) if self.ends else (SINK_TOKENS, WINDOW_TOKENS)
        return KeyScorer(landmark_keys(prompt, self.mean), 1, codec.landmark_bytes, hidden)


@dataclass(frozen=True)
class FourBitRows:
    """Keys and values of 4 bits each."""

    mean: bool = True

    def read(self, prompt: Prompt) -> Rows:
        codec = token_codec(prompt, self.mean)
        heads = torch.arange(prompt.spec.num_kv_heads, device=prompt.keys.device).repeat(prompt.tokens)
        keys, values = torch.empty_like(prompt.keys), torch.empty_like(prompt.values)
        for layer, encoded in enumerate(encoded_tokens(prompt, self.mean)):
            decoded = codec.decode_rows(layer, heads, encoded.rows.flatten(0, 1))
            for out, rows in zip((keys, values), decoded, strict=True):
                out[layer] = rows.view(prompt.tokens, *out.shape[1:2], -1).transpose(0, 1)
        return Rows(keys, values, 0.0, prompt.spec.num_layers * prompt.spec.num_kv_heads * codec.row_bytes)


@dataclass(frozen=True)
class ResidualRows:
    """Values of 4 bits; a key is its landmark, which is on the device already, plus a residual of 2 bits."""

    mean: bool = True

    def read(self, prompt: Prompt) -> Rows:
        spec = prompt.spec
        # The landmark as the codec reads it back lacks the mean.
        rough = landmark_keys(prompt, self.mean)
        if self.mean:
            assert prompt.key_means is not None
            rough = rough + prompt.key_means.view(spec.num_layers, spec.num_kv_heads, 1, -1)
        codec = TokenCodec(spec, None, prompt.keys.device)
        residuals = torch.empty_like(prompt.keys)
        for layer in range(spec.num_layers):
            left = (prompt.keys[layer] - rough[layer]).transpose(0, 1)
            residuals[layer] = _read_out(codec, codec.encode(layer, left, left))
        four_bit = prompt.once(FourBitRows(self.mean), lambda: FourBitRows(self.mean).read(prompt))
        host = codec.landmark_bytes + spec.num_layers * spec.num_kv_heads * codec.row_bytes // 2
        return Rows(rough + residuals, four_bit.values, 0.0, host)


def token_codec(prompt: Prompt, mean: bool) -> TokenCodec:
    """Raises ValueError if the mean is asked for and the model has none."""
    if mean and prompt.key_means is None:
        raise ValueError("this model has no key means: make them with `aquifer calibrate`, or say mean=off")
    means = prompt.key_means if mean else None
    return TokenCodec(prompt.spec, means, prompt.keys.device)


def encoded_tokens(prompt: Prompt, mean: bool) -> list[EncodedTokens]:
    """The prompt as the codec keeps it, layer by layer; encoded once."""

    def encode() -> list[EncodedTokens]:
        codec = token_codec(prompt, mean)
        layers = zip(prompt.keys, prompt.values, strict=True)
        return [
            codec.encode(layer, keys.transpose(0, 1), values.transpose(0, 1))
            for layer, (keys, values) in enumerate(layers)
        ]

    return prompt.once(("encoded", mean), encode)


def landmark_keys(prompt: Prompt, mean: bool) -> Tensor:
    """[L, H, T, D]: the keys that landmarks stand for, less the mean; decoded once."""

    def decode() -> Tensor:
        codec = token_codec(prompt, mean)
        keys = torch.empty_like(prompt.keys)
        for layer, encoded in enumerate(encoded_tokens(prompt, mean)):
            keys[layer] = _read_out(codec, encoded)
        return keys

    return prompt.once(("landmark keys", mean), decode)


def _read_out(codec: TokenCodec, encoded: EncodedTokens) -> Tensor:
    """[H, T, D]: scores are linear in the query, so unit queries read the landmarks back."""
    heads, head_dim = codec.spec.num_kv_heads, codec.spec.head_dim
    units = torch.eye(head_dim, device=encoded.codes.device).repeat(heads, 1) * head_dim**0.5
    return codec.score(units, encoded.codes, encoded.scales).view(heads, head_dim, -1).mT
