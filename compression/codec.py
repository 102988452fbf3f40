"""What a codec is. `make_codec` turns a name from the settings into one."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from aquifer.compression.aqua import AquaCodec
from aquifer.compression.chain import ChainCodec, SegmentDecoder
from aquifer.compression.predictors import Predictors
from aquifer.compression.raw import RawCodec
from aquifer.compression.spec import Encoded, KVSpec

FUSED_FROM = (9, 0)
"""Compute capability for which the codec's kernels are made: their tiles fill a Hopper's shared memory."""


class Codec(Protocol):
    """Turns pre-RoPE keys and values into segments of bytes and back.

    A segment is layer-major, so layer l is one contiguous slice that can be sent while layer l-1 is
    reconstructed. Its bytes depend on its own tokens only, so segments can be shared between prefixes.
    """

    @property
    def name(self) -> str:
        """ "raw", "higgs:2|3|4" or "aqua:2|3|4", and for the latter ":int8" if it predicts in integers."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex name of everything that changes bytes or arithmetic."""
        ...

    @property
    def spec(self) -> KVSpec: ...

    def layer_bytes(self, layer: int, num_tokens: int) -> int:
        """Size of one layer's slice of a segment."""
        ...

    def segment_bytes(self, num_tokens: int) -> int:
        """Size of a segment: the sum of its layers."""
        ...

    def encode(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Encode consecutive segments of counts[i] tokens in one pass.

        keys, values: [L, T, C] before RoPE, any float dtype, T = sum(counts).
        Returns one uint8 tensor [segment_bytes(counts[i])] per segment, on the same device.
        Raises ValueError for other shapes and, unless the codec is "raw", for values that are not finite.
        """
        ...

    def encode_unchecked(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> Encoded:
        """`encode` that does not wait for a device to say whether all values are finite."""
        ...

    def decoder(self, counts: Sequence[int], device: torch.device) -> SegmentDecoder:
        """A decoder for segments of counts[i] tokens whose bytes are on `device`."""
        ...

    @property
    def chain(self) -> ChainCodec | None:
        """How to decode faster than with `decoder`, on a device that this codec has kernels for."""
        ...


def make_codec(
    name: str,
    spec: KVSpec,
    *,
    device: torch.device,
    codec_dtype: torch.dtype,
    predictors: Predictors | None = None,
) -> Codec:
    """The codec called `name` for caches of this geometry, with its tables on `device`.

    codec_dtype: the dtype of the state between layers and of decoded KV; float32 on a CPU, bfloat16 on CUDA.
    predictors: needed by "aqua:*", ignored by the others.
    Raises ValueError for an unknown name, and for missing predictors or ones of another geometry.
    """
    if name == "raw":
        return RawCodec(spec)
    family, _, rest = name.partition(":")
    bits, colon, option = rest.partition(":")
    int8 = option == "int8" and family == "aqua"
    if family not in ("aqua", "higgs") or bits not in ("2", "3", "4") or (colon and not int8):
        raise ValueError(
            f"unknown codec {name!r}: use raw, aqua:2, aqua:3 or aqua:4 (:int8 behind it: predictions in "
            "integers), higgs:2, higgs:3 or higgs:4"
        )
    if family == "higgs":
        predictors = None
    elif predictors is None:
        raise ValueError(
            f"codec {name} needs predictors calibrated for this model: make them with `aquifer calibrate`, "
            "or use higgs:4, which needs none"
        )
    elif (predictors.num_layers, predictors.channels) != (spec.num_layers, spec.channels):
        raise ValueError(
            f"predictors for {predictors.num_layers} layers of {predictors.channels} channels do not fit "
            f"{spec.num_layers} layers of {spec.channels}: calibrate this model with `aquifer calibrate`"
        )
    kind: type[AquaCodec] = AquaCodec
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FUSED_FROM:
        from aquifer.compression.fused import FusedAquaCodec, fits

        if fits(spec, codec_dtype):
            kind = FusedAquaCodec
    return kind(spec, int(bits), predictors, device=device, codec_dtype=codec_dtype, int8=int8)
