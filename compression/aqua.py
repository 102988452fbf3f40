"""The AQUA-KV codec, and plain HIGGS, which is the same without anything calibrated.

A layer of a segment of n tokens, C channels, b bits and Hadamard groups of G channels is

    codes of keys    uint8   [n, C*b/8]
    codes of values  uint8   [n, C*b/8]
    scales of keys   float16 [n, C/G]
    scales of values float16 [n, C/G]
    zeros up to a multiple of 16 bytes

Layer 0 has nothing to be predicted from and is coded with 4 bits at any b, less its calibrated mean.
Source: AQUA-KV, arXiv 2501.19392.
"""

from collections.abc import Sequence
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from aquifer.compression.chain import ChainCodec, Codes, Half, HalfCoder, LayerCoder, SegmentDecoder
from aquifer.compression.fingerprint import fingerprint
from aquifer.compression.gaussian import grid_digest, load_grid
from aquifer.compression.predictors import Predictors, PredictorsError
from aquifer.compression.raw import check_kv
from aquifer.compression.spec import Encoded, KVSpec
from aquifer.kernels.hadamard import Rotation, hadamard_group
from aquifer.kernels.higgs import Quantizer
from aquifer.kernels.prediction import Constant, IntegerLinear, Linear, Prediction, Rounding

GRID_OF_BITS = {2: "d4n256", 3: "d2n64", 4: "d2n256"}
FIRST_LAYER_BITS = 4
SIGNS_SEED = 0xA0A
LAYER_ALIGNMENT = 16
LAYOUT_VERSION = 2
SCALE_BYTES = 2

CPU_BLOCK_VALUES = 1 << 19
"""On a CPU, rows run through a layer in blocks of this many values per half, so that they stay in cache."""


class AquaCodec:
    """aqua:b with predictors, higgs:b without; aqua:b:int8 predicts in integers."""

    arithmetic: ClassVar[str | None] = None
    """Named where it rounds otherwise than here, because then its segments are of no use here."""

    def __init__(
        self,
        spec: KVSpec,
        bits: int,
        predictors: Predictors | None,
        *,
        device: torch.device,
        codec_dtype: torch.dtype,
        int8: bool = False,
    ) -> None:
        """int8: predict in integers. Raises PredictorsError if these do not tell how values spread."""
        self.name = f"{'aqua' if predictors else 'higgs'}:{bits}{':int8' if int8 else ''}"
        if int8 and predictors and not predictors.card.tells_spreads:
            raise PredictorsError(
                "predicting in integers needs to know how values spread, which the card of these predictors "
                f"does not tell: calibrate this model again with `aquifer calibrate`, or use aqua:{bits}"
            )
        self.int8 = int8
        self.spec = spec
        self.codec_dtype = codec_dtype
        self.rotation = Rotation.of(spec.channels, SIGNS_SEED, device)
        self.coders = layer_coders(spec, bits, predictors, device, codec_dtype, int8=int8)
        self.fingerprint = fingerprint(
            name=self.name,
            layout=LAYOUT_VERSION,
            spec=spec.describe(),
            grids=[grid_digest(GRID_OF_BITS[b]) for b in (FIRST_LAYER_BITS, bits)],
            signs=SIGNS_SEED,
            codec_dtype=str(codec_dtype),
            predictors=predictors.hash if predictors else None,
            **({"arithmetic": self.arithmetic} if self.arithmetic else {}),
            **(
                {"steps": [[c.rounding.factor for c in layer if c.rounding] for layer in self.coders]}
                if int8
                else {}
            ),
        )

    @property
    def chain(self) -> ChainCodec | None:
        return None

    def layer_bytes(self, layer: int, num_tokens: int) -> int:
        return -(-sum(self.part_bytes(layer, num_tokens)) // LAYER_ALIGNMENT) * LAYER_ALIGNMENT

    def segment_bytes(self, num_tokens: int) -> int:
        # All layers but the first are alike, and this is asked for every record that is read.
        last = self.spec.num_layers - 1
        return self.layer_bytes(0, num_tokens) + last * self.layer_bytes(last, num_tokens)

    def encode(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> list[Tensor]:
        encoded = self.encode_unchecked(keys, values, counts)
        if encoded.damaged is not None and encoded.damaged.any():
            raise ValueError("keys or values hold values that are not finite")
        return encoded.bodies

    def encode_unchecked(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> Encoded:
        check_kv(self.spec, keys, values, counts)
        damaged = None
        if not (is_finite(keys) and is_finite(values)):  # it would spread over its row and all later layers
            spoiled = (~(keys.isfinite() & values.isfinite())).any(2).any(0)
            keys, values = (rows.masked_fill(spoiled[:, None], 0) for rows in (keys, values))
            damaged = spoiled.int()
        pieces: list[list[Tensor]] = [[] for _ in counts]
        state = self.new_state(sum(counts), keys.device)
        for layer in range(self.spec.num_layers):
            parts = self._encode_layer(layer, state, (keys[layer], values[layer]))
            split_parts = zip(*(part.split(list(counts)) for part in parts), strict=True)
            for segment, tokens, own_parts in zip(pieces, counts, split_parts, strict=True):
                segment += [part.flatten() for part in own_parts]
                padding = self.layer_bytes(layer, tokens) - sum(self.part_bytes(layer, tokens))
                segment.append(torch.zeros(padding, dtype=torch.uint8, device=keys.device))
        return Encoded([torch.cat(segment) for segment in pieces], damaged)

    def decoder(self, counts: Sequence[int], device: torch.device) -> SegmentDecoder:
        return AquaDecoder(self, counts, self.new_state(sum(counts), device))

    def split_layer(self, layer: int, slices: Sequence[Tensor], counts: Sequence[int]) -> tuple[Codes, Codes]:
        """The codes of keys and of values of one layer, for the tokens of all segments."""
        parts = []
        for piece, tokens in zip(slices, counts, strict=True):
            sizes = self.part_bytes(layer, tokens)
            parts.append(piece[: sum(sizes)].split(sizes))
        columns = [torch.cat(column).view(sum(counts), -1) for column in zip(*parts, strict=True)]
        key_codes, value_codes, key_scales, value_scales = columns
        return (key_codes, key_scales.view(torch.float16)), (value_codes, value_scales.view(torch.float16))

    def new_state(self, tokens: int, device: torch.device) -> Tensor:
        """The state [T, 2C] before layer 0."""
        return torch.zeros(tokens, 2 * self.spec.channels, dtype=self.codec_dtype, device=device)

    def _encode_layer(self, layer: int, state: Tensor, target: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Codes and scales of one layer as bytes [T, ...], in the order of the layout."""
        widths = [size // len(state) for size in self.part_bytes(layer, len(state))]
        parts = [torch.empty(len(state), width, dtype=torch.uint8, device=state.device) for width in widths]
        for rows in row_blocks(state):
            for half, coder in zip(Half, self.coders[layer], strict=True):
                rotated = self.rotation.rotate(target[half][rows].float())
                codes, scales = coder.encode(state[rows], rotated)
                parts[half][rows] = codes
                parts[2 + half][rows] = scales.view(torch.uint8)
        return parts

    def part_bytes(self, layer: int, num_tokens: int) -> list[int]:
        """Sizes of the codes of keys and values and of their scales, as they follow each other."""
        codes = num_tokens * self.coders[layer][0].quantizer.code_bytes(self.spec.channels)
        scales = num_tokens * (self.spec.channels // self.rotation.group) * SCALE_BYTES
        return [codes, codes, scales, scales]


class AquaDecoder:
    """The chain over the layers of several segments."""

    def __init__(self, codec: AquaCodec, counts: Sequence[int], state: Tensor) -> None:
        self._codec = codec
        self._counts = list(counts)
        self._state = state
        self._layer = 0

    def decode_layer(self, slices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        codes = self._codec.split_layer(self._layer, slices, self._counts)
        emitted = torch.empty_like(self._state)
        for rows in row_blocks(self._state):
            for half, coder in zip(Half, self._codec.coders[self._layer], strict=True):
                indices, scales = codes[half]
                coder.decode(self._state[rows], (indices[rows], scales[rows]))
            self._codec.rotation.unrotate(self._state[rows].float(), out=emitted[rows])
        self._layer += 1
        return Half.KEYS.of(emitted), Half.VALUES.of(emitted)


def layer_coders(
    spec: KVSpec,
    bits: int,
    predictors: Predictors | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    int8: bool,
) -> list[LayerCoder]:
    """How each layer is coded. Without predictors every prediction is zero."""
    group = hadamard_group(spec.channels)
    zero = torch.zeros(spec.channels)
    coders = []
    roundings: dict[Half, Rounding] = {}  # of the state, as the walk over the layers finds it
    for layer in range(spec.num_layers):
        maps = predictors.of_layer(layer) if predictors else ((None, zero), (None, zero))
        # Of the first layer a fine grid is wanted more than a fast step, because all others start from it.
        quantizer = load_quantizer(
            FIRST_LAYER_BITS if layer == 0 else bits, device, in_steps=int8 and layer > 0
        )
        pair = []
        for half, (weight, bias) in zip(Half, maps, strict=True):
            prediction: Prediction
            if weight is None:
                prediction = Constant(bias.to(device))
            elif int8:
                inputs = roundings[Half.KEYS], roundings[Half.VALUES]
                prediction = IntegerLinear.of(weight.to(device), bias.to(device), inputs)
            else:
                prediction = Linear(weight.to(device, dtype), bias.to(device))
            if int8 and predictors:
                roundings[half] = Rounding.of(prediction.bias, predictors.spread(layer, half))
            pair.append(HalfCoder(half, prediction, quantizer, group, roundings.get(half)))
        coders.append((pair[0], pair[1]))
    return coders


@cache
def load_quantizer(bits: int, device: torch.device, *, in_steps: bool = False) -> Quantizer:
    """The shipped grid for residuals of 2, 3 or 4 bits, with its tables."""
    return Quantizer.of(load_grid(GRID_OF_BITS[bits]), device, in_steps=in_steps)


def row_blocks(state: Tensor) -> list[slice]:
    """Blocks of rows to take through a layer one after the other; rows are independent of each other."""
    tokens, width = state.shape
    step = tokens if state.is_cuda else max(1, 2 * CPU_BLOCK_VALUES // width)
    return [slice(start, start + step) for start in range(0, tokens, step)]


def is_finite(rows: Tensor) -> bool:
    """Whether all values are finite. Their extremes are only then, and one reduction reads them only once."""
    low, high = torch.aminmax(rows)
    return bool(low.isfinite() & high.isfinite())
