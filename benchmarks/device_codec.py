"""The codec's kernels as `aquifer bench kernels` measures them. Imports Triton, so only where it runs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from aquifer.benchmarks.device_shape import HOST_SPAN, Shape
from aquifer.benchmarks.harness import LeftOutError
from aquifer.benchmarks.plain_kernels import BITS
from aquifer.benchmarks.roofline import Kernel, Limit
from aquifer.compression.aqua import FIRST_LAYER_BITS, SCALE_BYTES, SIGNS_SEED, load_quantizer
from aquifer.compression.codec import FUSED_FROM
from aquifer.compression.fused import fits
from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.kernels.hadamard import Rotation, hadamard_group
from aquifer.kernels.higgs import Quantizer
from aquifer.kernels.prediction import Copy, IntegerLinear, Linear, Rounding
from aquifer.kernels.triton.chain import decode_rows, predict, predict_and_add
from aquifer.kernels.triton.emit import emit
from aquifer.kernels.triton.encode import encode_rows
from aquifer.kernels.triton.gather import gather_slices
from aquifer.kernels.triton.state_attention import attend_state

KEYS = 0
"""Which half is coded."""


def codec_kernels(shape: Shape, *, integers: bool) -> list[Kernel]:
    """One half of a layer, and what decodes both at once; predicted in 16 bits, or in integers.

    Raises LeftOutError where the codec has no kernels.
    """
    cuda = shape.device.type == "cuda"
    if not fits(shape.spec, shape.dtype):
        raise LeftOutError("the codec's kernels do not take this geometry")
    if cuda and torch.cuda.get_device_capability(shape.device) < FUSED_FROM:
        raise LeftOutError("the codec's kernels need a GPU like Hopper")
    tokens, half = shape.tokens, shape.half_bytes(shape.tokens)
    layers = shape.layers(4 * half, lambda: _Layer(shape, integers=integers))
    one = layers[0]
    gemm, kind = 4.0 * tokens * shape.channels**2, Limit.GEMM_8 if integers else Limit.GEMM
    # State, prediction in float32, codes; in integers the state is one byte wide, and a copy is written.
    inputs = half if integers else 2 * half
    copy = half / 2 if integers else 0.0
    stored = float(one.data.numel())
    suffix = "int8" if integers else f"{8 * shape.dtype.itemsize} bits"
    steps = [
        Kernel(
            f"predict, {suffix}",
            [layer.predict for layer in layers],
            {Limit.MEMORY: inputs + 2 * half + one.weight_bytes, kind: gemm, Limit.START: 1},
        ),
        Kernel(
            f"predict and add, {suffix}",
            [layer.predict_and_add for layer in layers],
            {Limit.MEMORY: inputs + half + copy + one.weight_bytes + stored, kind: gemm, Limit.START: 1},
        ),
        Kernel(
            f"rotate and encode, {suffix}",
            [layer.encode for layer in layers],
            {Limit.MEMORY: 4 * half + copy + stored, Limit.START: 1},
        ),
    ]
    return steps if integers else [*steps, *_other_kernels(shape, layers), _gather(shape)]


def _other_kernels(shape: Shape, layers: list[_Layer]) -> list[Kernel]:
    """Where it is the same for both ways to predict."""
    tokens, half = shape.tokens, shape.half_bytes(shape.tokens)
    angles = 2.0 * tokens * shape.head_dim * shape.dtype.itemsize
    first = float(layers[0].first_data.numel())
    return [
        Kernel(
            "decode the first layer",
            [layer.decode_first for layer in layers],
            {Limit.MEMORY: 2 * half + first, Limit.START: 1},
        ),
        Kernel(
            "unrotate, RoPE and write",
            [layer.emit for layer in layers],
            {Limit.MEMORY: 4 * half + angles, Limit.START: 1},
        ),
        Kernel(
            "attention to a state, one token",
            [layer.attend for layer in layers],
            {Limit.MEMORY: 2 * half + angles, Limit.START: 3},
        ),
    ]


class _Layer:
    """One layer of a document on its way through the chain, and the operations on it."""

    def __init__(self, shape: Shape, *, integers: bool) -> None:
        tokens, channels, device = shape.tokens, shape.channels, shape.device
        self._rotation = Rotation.of(channels, SIGNS_SEED, device)
        self._group = self._rotation.group
        self._quantizer = load_quantizer(BITS, device, in_steps=integers)
        self._first_quantizer = load_quantizer(FIRST_LAYER_BITS, device)
        ring = shape.random(tokens, 3 * channels)
        self._state, self._out = ring[:, : 2 * channels], ring[:, 2 * channels :]
        self._rows = shape.random(tokens, channels)
        self._prediction = torch.zeros(tokens, channels, device=device)
        self._bias = torch.zeros(2, channels, device=device)
        weight = shape.random(2 * channels, channels) / (4 * channels**0.5)
        self._linear: Linear | IntegerLinear = Linear(weight, self._bias[0])
        self._inputs, self._copy = self._state, None
        if integers:
            rounding = Rounding.of(self._bias[0], 1.0)
            copies = torch.cat([rounding(third) for third in ring.split(channels, dim=1)], dim=1)
            self._linear = IntegerLinear.of(weight, self._bias[0], (rounding, rounding))
            self._inputs, self._copy = copies[:, : 2 * channels], Copy(copies[:, 2 * channels :], rounding)
        self.weight_bytes = float(self._linear.weight.nbytes)
        self._damaged = torch.zeros(tokens, dtype=torch.int32, device=device)
        self._offsets, self.data = self._laid_out(self._quantizer, halves=1)
        self._first_offsets, self.first_data = self._laid_out(self._first_quantizer, halves=2)
        self._rope = shape.random(tokens, shape.head_dim), shape.random(tokens, shape.head_dim)
        self._slots = torch.arange(tokens, device=device)
        self._keys, self._values = shape.random(2, shape.heads, tokens, shape.head_dim)
        self._query = shape.random(shape.query_heads, shape.head_dim)

    def _laid_out(self, quantizer: Quantizer, halves: int) -> tuple[Tensor, Tensor]:
        """Offsets int32 [4, T] into random codes, and scales of 1, of so many halves."""
        tokens, channels = self._rows.shape
        sizes = [quantizer.code_bytes(channels)] * 2 + [channels // self._group * SCALE_BYTES] * 2
        used = [size if part % 2 < halves else 0 for part, size in enumerate(sizes)]
        starts = [tokens * sum(used[:part]) for part in range(4)]
        number = torch.arange(tokens, dtype=torch.int32, device=self._rows.device)
        offsets = torch.stack([start + number * size for start, size in zip(starts, used, strict=True)])
        data = torch.randint(256, (tokens * sum(used),), dtype=torch.uint8, device=number.device)
        data[starts[2] :].view(torch.float16).fill_(1.0)
        return offsets, data

    def predict(self) -> None:
        predict(self._inputs, KEYS, self._linear, self._group, self._prediction)

    def predict_and_add(self) -> None:
        coded = self.data, self._offsets, self._quantizer
        predict_and_add(self._inputs, KEYS, self._linear, self._group, *coded, self._out, self._copy)

    def encode(self) -> None:
        encode_rows(
            self._rows,
            self._rotation.signs,
            self._group,
            self._prediction,
            self._quantizer,
            KEYS,
            self._offsets,
            self.data,
            self._out,
            self._damaged,
            self._copy,
        )

    def decode_first(self) -> None:
        coded = self.first_data, self._first_offsets, self._first_quantizer
        decode_rows(*coded, self._group, self._bias, self._state)

    def emit(self) -> None:
        rotated = self._state, self._rotation.signs, self._group
        emit(*rotated, self._rope, self._slots, self._keys, self._values)

    def attend(self) -> object:
        return attend_state(self._query, self._state, self._rotation.signs, self._group, self._rope)


class _Slices:
    """Segments in host memory, one after the other, each with some layers; `gather` collects one of them."""

    def __init__(self, shape: Shape) -> None:
        segments, device = -(-shape.tokens // SEGMENT_TOKENS), shape.device
        code_bytes = load_quantizer(BITS, torch.device("cpu")).code_bytes(shape.channels)
        scale_bytes = shape.channels // hadamard_group(shape.channels) * SCALE_BYTES
        self._size = 2 * SEGMENT_TOKENS * (code_bytes + scale_bytes)
        self.layer_bytes = segments * self._size
        self.layers = shape.num_layers(self.layer_bytes, span=HOST_SPAN)
        self._host = torch.zeros(
            segments, self.layers, self._size, dtype=torch.uint8, pin_memory=device.type == "cuda"
        )
        number = torch.arange(segments, device=device)
        self._records = self._host.data_ptr() + number * (self.layers * self._size)
        self._starts = [torch.full_like(number, at * self._size).int() for at in range(self.layers)]
        self._places, self._sizes = (number * self._size).int(), torch.full_like(number, self._size).int()
        self._target = torch.empty(self.layer_bytes, dtype=torch.uint8, device=device)

    def gather(self, layer: int) -> None:
        slices = self._records, self._starts[layer], self._places, self._sizes
        gather_slices(*slices, self._size, self._target)


def _gather(shape: Shape) -> Kernel:
    slices = _Slices(shape)
    moved = float(slices.layer_bytes)
    return Kernel(
        "gather slices from host memory",
        [partial(slices.gather, layer) for layer in range(slices.layers)],
        {Limit.BUS: moved, Limit.MEMORY: moved, Limit.START: 1},
    )
