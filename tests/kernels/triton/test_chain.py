"""A step of the chain against the plain arithmetic, and encoder against decoder bit for bit."""

import pytest
import torch
from kernel_inputs import normal
from torch import Tensor

from aquifer.compression.aqua import load_quantizer
from aquifer.kernels import higgs as plain
from aquifer.kernels.hadamard import Rotation
from aquifer.kernels.higgs import Quantizer
from aquifer.kernels.prediction import Copy, IntegerLinear, Linear, Rounding
from aquifer.kernels.triton.chain import decode_rows, predict, predict_and_add
from aquifer.kernels.triton.encode import encode_rows

# The interpreter truncates to bfloat16 where a device rounds.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16
SHAPES = [(1, 128, 128), (9, 384, 128), (5, 256, 256), (2, 1024, 1024)]
# Bits, half, tokens, channels, group: every two of bits, half and shape meet.
STEPS = [
    *((bits, bits % 2, 130, 256, 256) for bits in (2, 3, 4)),
    *((bits, 1 - bits % 2, 150, 384, 128) for bits in (2, 3, 4)),
    *((bits, half, 1, 128, 128) for bits, half in ((2, 0), (3, 1), (4, 1))),
]
MISS = 2**-7 if torch.cuda.is_available() else 2**-10


@pytest.fixture(params=[2, 3, 4])
def bits(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def quantizer(bits: int, device: torch.device) -> Quantizer:
    return load_quantizer(bits, device)


def laid_out(tokens: int, channels: int, group: int, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Offsets of tokens in reverse order behind a gap, and a buffer that they fill."""
    code_bytes, scale_bytes = quantizer.code_bytes(channels), channels // group * 2
    back = torch.arange(tokens - 1, -1, -1)
    codes, scales = 32 + back * code_bytes, 32 + 2 * tokens * code_bytes + back * scale_bytes
    parts = [codes, codes + tokens * code_bytes, scales, scales + tokens * scale_bytes]
    size = 32 + 2 * tokens * (code_bytes + scale_bytes) + 16
    offsets = torch.stack(parts).int().to(quantizer.grid.device)
    return offsets, torch.zeros(size, dtype=torch.uint8, device=quantizer.grid.device)


def parts_of(
    data: Tensor, offsets: Tensor, half: int, code_bytes: int, num_scales: int
) -> tuple[Tensor, Tensor]:
    """Codes and scales of half of a layer, in the order of the tokens."""
    rows = [data[start : start + code_bytes] for start in offsets[half].tolist()]
    scales = [data[start : start + 2 * num_scales] for start in offsets[2 + half].tolist()]
    return torch.stack(rows), torch.stack(scales).view(torch.float16)


@pytest.mark.parametrize(("tokens", "channels", "group"), SHAPES)
def test_coded_rows_come_back_as_the_encoders_state(
    tokens: int, channels: int, group: int, quantizer: Quantizer, launched: list[str]
) -> None:
    device = quantizer.grid.device
    rotation = Rotation.of(channels, 5, device)
    offsets, data = laid_out(tokens, channels, group, quantizer)
    x, bias = normal(2, tokens, channels, device=device), normal(2, channels, device=device)
    state = torch.zeros(2, tokens, channels, dtype=DTYPE, device=device)
    damaged = torch.zeros(tokens, dtype=torch.int32, device=device)
    for half in (0, 1):
        prediction = bias[half].expand(tokens, -1)
        encode_rows(
            x[half], rotation.signs, group, prediction, quantizer, half, offsets, data, state[half], damaged
        )
    decoded = torch.zeros(tokens, 3 * channels, dtype=DTYPE, device=device)[:, channels:]
    decode_rows(data, offsets, quantizer, group, bias, decoded, block_tokens=4)
    assert torch.equal(decoded, torch.cat((state[0], state[1]), dim=1))
    assert not damaged.any() and not data[:32].any() and not data[-16:].any()
    assert launched == ["_encode_rows", "_encode_rows", "_decode_rows"]

    for half in (0, 1):
        missed = rotation.rotate(x[half]) - bias[half]
        codes, scales = parts_of(data, offsets, half, quantizer.code_bytes(channels), channels // group)
        assert torch.allclose(scales, plain.higgs_encode(missed, quantizer, group)[1], rtol=2**-9, atol=0)
        expected = plain.higgs_decode_ref(codes, scales, quantizer.grid) + bias[half]
        torch.testing.assert_close(state[half].float(), expected, rtol=2 * MISS, atol=2 * MISS)
        error = (expected - bias[half] - missed).square().mean() / missed.square().mean()
        assert error < {2: 0.13, 3: 0.04, 4: 0.012}[quantizer.index_bits // quantizer.dimension]


@pytest.mark.parametrize(("bits", "half", "tokens", "channels", "group"), STEPS, indirect=["bits"])
def test_a_decoders_step_makes_the_encoders_state(
    tokens: int, channels: int, group: int, half: int, quantizer: Quantizer, launched: list[str]
) -> None:
    device = quantizer.grid.device
    ring = normal(tokens, 3 * channels, device=device).to(DTYPE)
    weight = (normal(2 * channels, channels, device=device) / channels**0.5).to(DTYPE)
    if device.type == "cpu":
        # The interpreter multiplies with numpy, which on some CPUs sums up a row in an order that depends on
        # its place. These sums are exact in any order.
        ring, weight = ((x * 64).round() / 64 for x in (ring, weight))
    state, out = ring[:, : 2 * channels], ring[:, 2 * channels :]
    bias, prediction = normal(channels, device=device), torch.empty(tokens, channels, device=device)
    linear = Linear(weight, bias)
    predict(state, half, linear, group, prediction)
    expected = state.double() @ weight.roll(half * channels, 0).double() + bias
    torch.testing.assert_close(prediction.double(), expected, rtol=1e-4, atol=1e-4)

    offsets, data = laid_out(tokens, channels, group, quantizer)
    x, damaged = normal(tokens, channels, device=device), torch.zeros_like(offsets[0])
    signs, coded = Rotation.of(channels, 5, device).signs, torch.empty_like(out)
    encode_rows(x, signs, group, prediction, quantizer, half, offsets, data, coded, damaged)
    predict_and_add(state, half, linear, group, data, offsets, quantizer, out)
    assert torch.equal(out, coded)
    # The same rows among fewer others.
    for start, stop in ((0, 1), (tokens // 2, tokens)):
        predict_and_add(
            state[start:stop],
            half,
            linear,
            group,
            data,
            offsets[:, start:stop].contiguous(),
            quantizer,
            out[start:stop].zero_(),
        )
    assert torch.equal(out, coded)
    assert launched == ["_step", "_encode_rows", "_step", "_step", "_step"]


@pytest.mark.parametrize(
    ("bits", "half", "tokens", "channels", "group"),
    [(2, 0, 130, 256, 256), (3, 1, 150, 384, 128), (4, 1, 1, 128, 128)],
)
def test_a_step_in_integers_makes_the_encoders_state_and_its_copy(
    tokens: int, channels: int, group: int, half: int, bits: int, device: torch.device, launched: list[str]
) -> None:
    quantizer = load_quantizer(bits, device, in_steps=True)
    state, mean = normal(tokens, 2 * channels, device=device), normal(2 * channels, device=device)
    roundings = Rounding.of(mean[:channels], 1.0), Rounding.of(mean[channels:], 2.0)
    weight = normal(2 * channels, channels, device=device) / channels**0.5
    linear = IntegerLinear.of(weight, normal(channels, device=device), roundings)
    keys, values = (rounding(rows) for rounding, rows in zip(roundings, state.chunk(2, dim=1), strict=True))
    ring = torch.zeros(tokens, 3 * channels, dtype=torch.int8, device=device)
    ring[:, : 2 * channels] = torch.cat((values, keys) if half else (keys, values), dim=1)
    inputs, prediction = ring[:, : 2 * channels], torch.empty(tokens, channels, device=device)
    predict(inputs, half, linear, group, prediction)
    torch.testing.assert_close(prediction, linear(state), rtol=1e-6, atol=1e-5)

    offsets, data = laid_out(tokens, channels, group, quantizer)
    x, damaged = normal(tokens, channels, device=device), torch.zeros_like(offsets[0])
    signs, rounding = Rotation.of(channels, 5, device).signs, Rounding.of(linear.bias, 1.5)
    coded, coded_copy = torch.empty_like(x, dtype=DTYPE), Copy(torch.empty_like(keys), rounding)
    encode_rows(x, signs, group, prediction, quantizer, half, offsets, data, coded, damaged, coded_copy)
    assert torch.equal(coded_copy.rows, rounding(coded))
    codes, scales = parts_of(data, offsets, half, quantizer.code_bytes(channels), channels // group)
    expected = plain.higgs_decode_ref(codes, scales, quantizer.grid) + prediction
    torch.testing.assert_close(coded.float(), expected, rtol=MISS, atol=MISS)

    for start, stop in ((0, tokens), (0, 1), (tokens // 2, tokens)):  # the same rows among fewer others
        part = slice(start, stop)
        out, copy = torch.empty_like(coded[part]), Copy(ring[part, 2 * channels :], rounding)
        own_offsets = offsets[:, part].contiguous()
        predict_and_add(inputs[part], half, linear, group, data, own_offsets, quantizer, out, copy)
        assert torch.equal(out, coded[part]) and torch.equal(copy.rows, coded_copy.rows[part])
    assert launched == ["_step", "_encode_rows", "_step", "_step", "_step"]


def test_layers_without_predictions_are_copied_to_int8(device: torch.device, launched: list[str]) -> None:
    tokens, channels = 9, 256
    quantizer = load_quantizer(4, device)
    offsets, data = laid_out(tokens, channels, channels, quantizer)
    bias = normal(2, channels, device=device)
    damaged = torch.zeros(tokens, dtype=torch.int32, device=device)
    state = torch.zeros(2, tokens, channels, dtype=DTYPE, device=device)
    for half, x in enumerate(normal(2, tokens, channels, device=device)):
        signs, prediction = Rotation.of(channels, 5, device).signs, bias[half].expand(tokens, -1)
        encode_rows(x, signs, channels, prediction, quantizer, half, offsets, data, state[half], damaged)
    decoded = torch.zeros(tokens, 2 * channels, dtype=DTYPE, device=device)
    ring = torch.zeros(tokens, 3 * channels, dtype=torch.int8, device=device)
    keys, values = (
        Copy(rows, Rounding.of(centre, spread))
        for rows, centre, spread in zip(ring.split(channels, dim=1), bias, (1.0, 3.0), strict=False)
    )
    decode_rows(data, offsets, quantizer, channels, bias, decoded, (keys, values))
    assert torch.equal(decoded, torch.cat((state[0], state[1]), dim=1))
    for copy, half_of_state in zip((keys, values), state, strict=True):
        assert torch.equal(copy.rows, copy.rounding(half_of_state)) and copy.rows.any()
    assert not ring[:, 2 * channels :].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_rows_that_are_not_finite_are_marked(bad: float, device: torch.device, launched: list[str]) -> None:
    quantizer = load_quantizer(2, device)
    offsets, data = laid_out(5, 256, 128, quantizer)
    x = normal(5, 256, device=device)
    x[1, 7] = x[4, 200] = bad
    damaged = torch.zeros(5, dtype=torch.int32, device=device)
    state, zero = torch.zeros(5, 256, dtype=DTYPE, device=device), torch.zeros(1, 256, device=device)
    signs = Rotation.of(256, 5, device).signs
    encode_rows(x, signs, 128, zero.expand(5, -1), quantizer, 0, offsets, data, state, damaged)
    assert damaged.tolist() == [0, 1, 0, 0, 1]
    assert launched == ["_encode_rows"]


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    state, bias = torch.zeros(3, 384, dtype=DTYPE, device=device), torch.zeros(192, device=device)
    out, weight = torch.zeros(3, 192, device=device), torch.zeros(384, 192, dtype=DTYPE, device=device)
    with pytest.raises(ValueError, match="192 channels in groups of 64 are not whole tiles of 128"):
        predict(state, 0, Linear(weight, bias), 64, out)
    with pytest.raises(ValueError, match="weight is"):
        predict(state, 0, Linear(weight.float(), bias), 64, out)
    quantizer = load_quantizer(2, device)
    offsets, data = laid_out(3, 128, 128, quantizer)
    with pytest.raises(ValueError, match="offsets is"):
        decode_rows(
            data, offsets[:, 1:], quantizer, 128, bias.view(2, -1), torch.zeros(3, 192, device=device)
        )
