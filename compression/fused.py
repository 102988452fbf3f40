"""AQUA-KV on a device with Triton kernels: the same format, its arithmetic in four kernels.

A layer is decoded by a GEMM per half, which also adds the residual, and one pass that leaves the rotated
domain, applies RoPE and writes where attention reads. It is encoded by a GEMM and one pass per half. Nothing
here waits for the device.

Import this module only where a CUDA device is in use, or Triton's interpreter.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from aquifer.compression.aqua import AquaCodec
from aquifer.compression.chain import ChainCodec, Half
from aquifer.compression.raw import check_kv
from aquifer.compression.spec import Encoded, KVSpec
from aquifer.kernels.hadamard import hadamard_group
from aquifer.kernels.prediction import Copy, IntegerLinear, Linear
from aquifer.kernels.triton.chain import COLUMNS, decode_rows, predict, predict_and_add
from aquifer.kernels.triton.emit import emit
from aquifer.kernels.triton.encode import encode_rows
from aquifer.kernels.triton.state_attention import attend_state

_GROUPS = (16, 4096)
_LARGEST_BUFFER = 2**31


def fits(spec: KVSpec, codec_dtype: torch.dtype) -> bool:
    """Whether the kernels take this geometry."""
    group, head_dim = hadamard_group(spec.channels), spec.head_dim
    smallest, largest = _GROUPS
    return (
        codec_dtype in (torch.bfloat16, torch.float16)
        and spec.channels % COLUMNS == 0
        and smallest <= group <= largest
        and smallest <= head_dim <= group
        and head_dim & (head_dim - 1) == 0
    )


class FusedAquaCodec(AquaCodec):
    """AquaCodec in kernels. Its GEMMs give a row the same bits in any batch, so that what was encoded a few
    segments at a time is decoded to the encoder's state in a group of any size."""

    arithmetic: ClassVar[str | None] = "fused-1"

    @cached_property
    def biases(self) -> list[Tensor]:
        """float32 [2, C] of each layer."""
        return [torch.stack([coder.prediction.bias for coder in layer]) for layer in self.coders]

    # Most prompts are cut in the same way, and the tables of a batch take a while to compute.

    @cached_property
    def encode_offsets(self) -> Callable[[tuple[int, ...], torch.device], Tensor]:
        """See _encode_offsets."""
        return lru_cache(maxsize=8)(self._encode_offsets)

    @cached_property
    def decode_offsets(self) -> Callable[[bool, tuple[int, ...], torch.device], Tensor]:
        """See _decode_offsets."""
        return lru_cache(maxsize=8)(self._decode_offsets)

    def encode_unchecked(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> Encoded:
        check_kv(self.spec, keys, values, counts)
        tokens, device = sum(counts), keys.device
        sizes = [self.segment_bytes(count) for count in counts]
        offsets = self.encode_offsets(tuple(counts), device)
        data = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        damaged = torch.zeros(tokens, dtype=torch.int32, device=device)
        prediction = torch.empty(tokens, self.spec.channels, device=device)
        state = ChainState(self, tokens, device)
        for layer, coders in enumerate(self.coders):
            for half, rows in zip(Half, (keys, values), strict=True):
                number = int(half)  # kernels take plain integers
                coder = coders[half]
                linear = coder.prediction
                if isinstance(linear, Linear | IntegerLinear):
                    predict(state.inputs(layer, half), number, linear, self.rotation.group, prediction)
                    expected = prediction
                else:
                    expected = linear.bias.expand(tokens, -1)
                encode_rows(
                    rows[layer],
                    self.rotation.signs,
                    self.rotation.group,
                    expected,
                    coder.quantizer,
                    number,
                    offsets[layer],
                    data,
                    state.values.half(layer, half),
                    damaged,
                    state.copy(layer, half),
                )
        return Encoded(list(data.split(sizes)), damaged)

    @property
    def chain(self) -> ChainCodec:
        return self

    def chain_bytes(self, tokens: int) -> int:
        state = StateRing.size(self.spec, tokens) * (self.codec_dtype.itemsize + int(self.int8))
        return state + 2 * 4 * tokens * torch.int32.itemsize  # and two tables of offsets

    def decoder(self, counts: Sequence[int], device: torch.device) -> "FusedDecoder":
        return self.chain_decoder(counts, device)

    def chain_decoder(self, counts: Sequence[int], device: torch.device) -> "FusedDecoder":
        return FusedDecoder(self, counts, device)

    def _encode_offsets(self, counts: tuple[int, ...], device: torch.device) -> Tensor:
        """int32 [L, 4, T]: where in the segments, end to end, each token's parts of each layer are."""
        sizes = torch.tensor([self.segment_bytes(count) for count in counts])
        if int(sizes.sum()) >= _LARGEST_BUFFER:
            raise ValueError(f"{len(counts)} segments at once are too many for 32-bit offsets")
        starts = sizes.cumsum(0) - sizes
        tables = []
        for layer in range(self.spec.num_layers):
            tables.append(self._offsets(layer, counts, starts))
            starts = starts + torch.tensor([self.layer_bytes(layer, count) for count in counts])
        return torch.stack(tables).to(device)

    def _decode_offsets(self, first: bool, counts: tuple[int, ...], device: torch.device) -> Tensor:
        """int32 [4, T]: where in a layer's slices, end to end, each token's parts are.

        first: of layer 0; all others are alike.
        """
        layer = 0 if first else self.spec.num_layers - 1
        sizes = torch.tensor([self.layer_bytes(layer, count) for count in counts])
        return self._offsets(layer, counts, sizes.cumsum(0) - sizes).to(device)

    def _offsets(self, layer: int, counts: tuple[int, ...], starts: Tensor) -> Tensor:
        """int32 [4, T], for slices that begin at starts [segments]."""
        lengths = torch.tensor(counts)
        first = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        number = torch.arange(len(first)) - first
        start, length = starts.repeat_interleave(lengths), lengths.repeat_interleave(lengths)
        code_bytes, _, scale_bytes, _ = self.part_bytes(layer, 1)
        codes = start + number * code_bytes
        scales = start + 2 * length * code_bytes + number * scale_bytes
        return torch.stack((codes, codes + length * code_bytes, scales, scales + length * scale_bytes)).int()


class ChainState:
    """The states of T tokens, and beside them their int8 copies if that is what predictions start from."""

    def __init__(self, codec: FusedAquaCodec, tokens: int, device: torch.device) -> None:
        self._coders = codec.coders
        self.values = StateRing(codec.spec, tokens, codec.codec_dtype, device)
        self.copies = StateRing(codec.spec, tokens, torch.int8, device) if codec.int8 else None

    @property
    def memory(self) -> list[Tensor]:
        return [ring.memory for ring in (self.values, self.copies) if ring]

    def inputs(self, layer: int, half: Half) -> Tensor:
        """[T, 2C] that a half is predicted from."""
        return (self.copies or self.values).inputs(layer, half)

    def copy(self, layer: int, half: Half) -> Copy | None:
        """Where the copy of a half belongs."""
        rounding = self._coders[layer][half].rounding
        return Copy(self.copies.half(layer, half), rounding) if self.copies and rounding else None


class StateRing:
    """The states of T tokens in all layers, one after the other, in the memory of one and a half.

    A step reads two neighbouring halves and writes a third: keys of a layer come from keys and values of the
    layer before, values from the values before and the layer's own keys. So the halves of all layers lie in
    one long row of which only three are alive, and the rows of the tokens are staggered: half s of token t
    begins at (3 t + s) * C.
    """

    def __init__(self, spec: KVSpec, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self._channels, self._tokens = spec.channels, tokens
        self.memory = torch.empty(self.size(spec, tokens), dtype=dtype, device=device)

    @staticmethod
    def size(spec: KVSpec, tokens: int) -> int:
        """Elements of the memory of so many tokens."""
        return (3 * (tokens - 1) + 2 * spec.num_layers) * spec.channels

    def half(self, layer: int, half: Half) -> Tensor:
        """[T, C]: keys or values of a layer."""
        return self._halves(2 * layer + half, 1)

    def both(self, layer: int) -> Tensor:
        """[T, 2C]: keys beside values of a layer."""
        return self._halves(2 * layer, 2)

    def inputs(self, layer: int, half: Half) -> Tensor:
        """[T, 2C] that a half is predicted from: the two halves before it."""
        return self._halves(2 * layer + half - 2, 2)

    def _halves(self, first: int, count: int) -> Tensor:
        shape, stride = (self._tokens, count * self._channels), (3 * self._channels, 1)
        return self.memory.as_strided(shape, stride, first * self._channels)


class FusedDecoder:
    """See ChainDecoder and SegmentDecoder."""

    def __init__(self, codec: FusedAquaCodec, counts: Sequence[int], device: torch.device) -> None:
        self._codec = codec
        self._tokens, self._device = sum(counts), device
        self._state = ChainState(codec, self._tokens, device)
        own = tuple(counts), device
        self._offsets = codec.decode_offsets(True, *own), codec.decode_offsets(False, *own)
        self._layer = 0

    @property
    def buffers(self) -> Sequence[Tensor]:
        return *self._state.memory, *self._offsets

    @property
    def tables(self) -> Sequence[Tensor]:
        return self._offsets

    def advance(self, layer: int, half: Half, data: Tensor) -> None:
        codec, state, offsets = self._codec, self._state, self._offsets[min(layer, 1)]
        coder, group = codec.coders[layer][half], codec.rotation.group
        linear, quantizer = coder.prediction, coder.quantizer
        if isinstance(linear, Linear | IntegerLinear):
            inputs, out, copy = (
                state.inputs(layer, half),
                state.values.half(layer, half),
                state.copy(layer, half),
            )
            predict_and_add(inputs, int(half), linear, group, data, offsets, quantizer, out, copy)
        elif half is Half.VALUES:  # both halves at once, now that none of the layer before is needed
            keys, values = (state.copy(layer, half) for half in Half)
            copies = (keys, values) if keys and values else None
            decode_rows(
                data, offsets, quantizer, group, codec.biases[layer], state.values.both(layer), copies
            )

    def emit(
        self, layer: int, rope: tuple[Tensor, Tensor], slots: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        rotation = self._codec.rotation
        emit(self._state.values.both(layer), rotation.signs, rotation.group, rope, slots, keys, values)

    def attend(self, layer: int, rope: tuple[Tensor, Tensor], q: Tensor) -> tuple[Tensor, Tensor]:
        rotation = self._codec.rotation
        return attend_state(q, self._state.values.both(layer), rotation.signs, rotation.group, rope)

    def decode_layer(self, slices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        layer, spec, dtype = self._layer, self._codec.spec, self._codec.codec_dtype
        self._layer += 1
        data = torch.cat(list(slices))
        for half in Half:
            self.advance(layer, half, data)
        shape = (spec.num_kv_heads, self._tokens, spec.head_dim)
        keys, values = torch.empty(2, *shape, dtype=dtype, device=self._device)
        upright = torch.zeros(2, *shape[1:], dtype=dtype, device=self._device)
        upright[0] = 1  # RoPE by no angle
        slots = torch.arange(self._tokens, device=self._device)
        self.emit(layer, (upright[0], upright[1]), slots, keys, values)
        return keys.transpose(0, 1).flatten(1), values.transpose(0, 1).flatten(1)
