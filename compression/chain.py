"""The arithmetic of AQUA-KV's chain over the layers, shared by encoder, decoder and calibration.

The state of a token is the row [K^_l, V^_l], both rotated (see kernels/hadamard.py), in the codec dtype.
Layer l turns it into its own reconstruction in two steps, each a prediction plus a decoded residual:

    K^_l = [K^_{l-1}, V^_{l-1}] @ Wk + bk  + deq(residual)
    V^_l = [K^_l,     V^_{l-1}] @ Wv + bv  + deq(residual)

The paper predicts keys from keys alone; the values of the layer before cut their error by a quarter
(figures in deploy/DECISIONS.md). Because predictions start from reconstructions, which the decoder has
too, errors do not build up. A prediction may also round what it starts from (kernels/prediction.py): what it
then misses is coded like the rest. Its sum with the residual, in float32, is rounded to the codec dtype once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from aquifer.kernels.higgs import Quantizer, higgs_decode_add, higgs_encode
from aquifer.kernels.prediction import Prediction, Rounding

Codes = tuple[Tensor, Tensor]
"""Packed indices uint8 [T, C*bits/8] and scales float16 [T, C/G] of the residuals of one half of a layer."""


class Half(IntEnum):
    """Which half of the state. Keys come first, because they help to predict the values."""

    KEYS = 0
    VALUES = 1

    def of(self, state: Tensor) -> Tensor:
        """View [T, C] of this half of a state [T, 2C]."""
        channels = state.shape[1] // 2
        return state[:, self * channels : (self + 1) * channels]


@dataclass(frozen=True)
class HalfCoder:
    """How the keys, or the values, of one layer are coded."""

    half: Half
    prediction: Prediction
    quantizer: Quantizer
    group: int
    """G: channels per Hadamard group and scale."""
    rounding: Rounding | None = None
    """How predictions that start from this half round it, where they do."""

    def encode(self, state: Tensor, target: Tensor) -> Codes:
        """Code rotated rows `target`, float32 [T, C], and move this half of the state on, in place."""
        prediction = self.prediction(state)
        codes = higgs_encode(target - prediction, self.quantizer, self.group)
        self._reconstruct(state, prediction, codes)
        return codes

    def decode(self, state: Tensor, codes: Codes) -> None:
        """Move this half of the state on, in place, exactly as `encode` did."""
        self._reconstruct(state, self.prediction(state), codes)

    def _reconstruct(self, state: Tensor, prediction: Tensor, codes: Codes) -> None:
        higgs_decode_add(prediction, *codes, self.quantizer, out=self.half.of(state))


LayerCoder = tuple[HalfCoder, HalfCoder]
"""Keys and values of one layer, to be coded in this order."""


class SegmentDecoder(Protocol):
    """Decodes several segments, not necessarily neighbours, side by side and layer by layer."""

    def decode_layer(self, slices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Reconstruct the next layer; called for layers 0 to L-1 in order.

        slices[i]: uint8 [layer_bytes(layer, counts[i])], on the device of the decoder.
        Returns pre-RoPE keys and values [T, C], T = sum(counts), in the codec's dtype ("raw": the model's);
        they may be views of one tensor.
        """
        ...


class ChainDecoder(Protocol):
    """The chain over the layers of several segments on a device with kernels for it.

    Layers are decoded in order, each in steps that may run on different queues of the device:

        advance   moves the state on, keys first; values only after `emit` or `attend` of the layer before
        emit      writes keys and values to where attention reads them; after `advance`
        attend    takes its place for a single new token: nothing is written
    """

    @property
    def buffers(self) -> Sequence[Tensor]:
        """All device memory that the steps share."""
        ...

    @property
    def tables(self) -> Sequence[Tensor]:
        """Those of the buffers that other decoders read as well."""
        ...

    def advance(self, layer: int, half: Half, data: Tensor) -> None:
        """data: uint8, the layer's slices of all segments end to end."""
        ...

    def emit(
        self, layer: int, rope: tuple[Tensor, Tensor], slots: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """rope: cos and sin [T, D]; slots: int64 [T]; keys (after RoPE), values: [H, slots, D]."""
        ...

    def attend(self, layer: int, rope: tuple[Tensor, Tensor], q: Tensor) -> tuple[Tensor, Tensor]:
        """rope: cos and sin [T, D]; q: [Hq, D] after RoPE. Returns (out [Hq, D], lse float32 [Hq])."""
        ...


class ChainCodec(Protocol):
    """A codec with kernels for a device."""

    def chain_decoder(self, counts: Sequence[int], device: torch.device) -> ChainDecoder:
        """For segments of counts[i] tokens."""
        ...

    def chain_bytes(self, tokens: int) -> int:
        """Device memory that a decoder of so many tokens takes."""
        ...
