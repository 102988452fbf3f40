"""The raw codec: KV as it is, in the model's dtype. The yardstick, and the form of sink records."""

from collections.abc import Sequence

import torch
from torch import Tensor

from aquifer.compression.fingerprint import fingerprint
from aquifer.compression.spec import Encoded, KVSpec


class RawCodec:
    """Bit-exact storage of pre-RoPE keys and values. A layer is K [T, C], then V [T, C]."""

    name = "raw"
    chain = None

    def __init__(self, spec: KVSpec) -> None:
        self.spec = spec
        self.fingerprint = fingerprint(name=self.name, spec=spec.describe())

    def layer_bytes(self, layer: int, num_tokens: int) -> int:
        return 2 * num_tokens * self.spec.channels * self.spec.dtype.itemsize

    def segment_bytes(self, num_tokens: int) -> int:
        return self.spec.bytes_per_token * num_tokens

    def encode(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> list[Tensor]:
        check_kv(self.spec, keys, values, counts)
        rows = torch.stack((keys, values), dim=1).to(self.spec.dtype)
        segments = rows.split(list(counts), dim=2)
        return [segment.contiguous().view(torch.uint8).flatten() for segment in segments]

    def encode_unchecked(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> Encoded:
        return Encoded(self.encode(keys, values, counts))

    def rows(self, segment: Tensor) -> Tensor:
        """All layers of a segment at once: keys and values [L, 2, T, C], a view of its bytes."""
        return segment.view(self.spec.dtype).view(self.spec.num_layers, 2, -1, self.spec.channels)

    def decoder(self, counts: Sequence[int], device: torch.device) -> "RawDecoder":
        return RawDecoder(self.spec, counts)


class RawDecoder:
    """Gives the layers of several segments back as they were."""

    def __init__(self, spec: KVSpec, counts: Sequence[int]) -> None:
        self._spec = spec
        self._counts = counts

    def decode_layer(self, slices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        shape = (2, -1, self._spec.channels)
        parts = [piece.view(self._spec.dtype).view(shape) for piece in slices]
        keys, values = torch.cat(parts, dim=1)
        return keys, values


def check_kv(spec: KVSpec, keys: Tensor, values: Tensor, counts: Sequence[int]) -> None:
    """Raise ValueError unless keys and values are [L, sum(counts), C] of this spec."""
    expected = (spec.num_layers, sum(counts), spec.channels)
    if tuple(keys.shape) != expected or tuple(values.shape) != expected:
        raise ValueError(
            f"expected keys and values of shape {expected} (layers, tokens, channels), "
            f"found {tuple(keys.shape)} and {tuple(values.shape)}"
        )
