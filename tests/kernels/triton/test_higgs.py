"""Bit for bit what the plain code does on a CPU: a segment must not depend on the machine that encoded it."""

import numpy as np
import pytest
import torch
from torch import Tensor

from aquifer.compression.aqua import load_quantizer
from aquifer.kernels import higgs as plain
from aquifer.kernels.higgs import Quantizer
from aquifer.kernels.triton.higgs import higgs_decode_add, higgs_encode

# The interpreter truncates to bfloat16 where a device rounds.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
SHAPES = [(1, 64, 64), (7, 96, 32), (257, 128, 128), (3, 1024, 1024)]


@pytest.fixture(params=[2, 3, 4])
def bits(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def quantizer(bits: int, device: torch.device) -> Quantizer:
    return load_quantizer(bits, device)


@pytest.fixture
def twin(bits: int) -> Quantizer:
    return load_quantizer(bits, torch.device("cpu"))


@pytest.fixture(autouse=True)
def rounds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's fma rounds the product before it adds; a device's does not, nor does the twin."""
    if torch.cuda.is_available():
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(self: object, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)


def rows(tokens: int, channels: int) -> Tensor:
    return 3 * torch.randn(tokens, channels, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize(("tokens", "channels", "group"), SHAPES)
def test_encoding_equals_its_twin(
    tokens: int, channels: int, group: int, quantizer: Quantizer, twin: Quantizer, launched: list[str]
) -> None:
    x = rows(tokens, channels)
    codes, scale = (t.cpu() for t in higgs_encode(x.to(quantizer.grid.device), quantizer, group))
    expected, expected_scale = plain.higgs_encode(x, twin, group)
    assert launched == ["_encode"]
    # Another order of summation may move a scale by its last bit; codes hang on the scale.
    same = scale == expected_scale
    assert same.float().mean() > 0.99
    torch.testing.assert_close(scale, expected_scale, rtol=2**-10, atol=0)
    shape = (*scale.shape, -1)
    assert torch.equal(codes.view(shape)[same], expected.view(shape)[same])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "channels", "group"), SHAPES)
def test_decoding_equals_its_twin(
    tokens: int,
    channels: int,
    group: int,
    dtype: torch.dtype,
    quantizer: Quantizer,
    twin: Quantizer,
    launched: list[str],
) -> None:
    x = rows(tokens, channels)
    codes, scale = plain.higgs_encode(x, twin, group)
    base = x.flip(0)
    expected = torch.full((tokens, 2 * channels), 7.0, dtype=dtype)
    device = quantizer.grid.device
    found = expected.to(device, copy=True)
    arguments = [t.to(device) for t in (base, codes, scale)]
    higgs_decode_add(*arguments, quantizer, out=found[:, channels:])
    plain.higgs_decode_add(base, codes, scale, twin, out=expected[:, channels:])
    assert launched == ["_decode_add"]
    assert torch.equal(found.cpu(), expected)


def test_one_row_may_be_the_base_of_all(quantizer: Quantizer, launched: list[str]) -> None:
    """A prediction without predictors is the bias alone."""
    x = rows(5, 64).to(quantizer.grid.device)
    codes, scale = plain.higgs_encode(x, quantizer, 64)
    found, expected = torch.empty_like(x), torch.empty_like(x)
    higgs_decode_add(x[0].expand(5, -1), codes, scale, quantizer, out=found)
    higgs_decode_add(x[0].repeat(5, 1), codes, scale, quantizer, out=expected)
    assert torch.equal(found, expected)
    assert launched == ["_decode_add", "_decode_add"]


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_zeros_decode_to_zeros_and_huge_values_stay_finite(quantizer: Quantizer, launched: list[str]) -> None:
    x = rows(3, 64).to(quantizer.grid.device)
    x[0] = 0
    x[1] = 1e30
    codes, scale = higgs_encode(x, quantizer, 64)
    found = torch.empty_like(x)
    higgs_decode_add(torch.zeros_like(x), codes, scale, quantizer, out=found)
    assert not found[0].any() and found.isfinite().all()
    assert launched == ["_encode", "_decode_add"]


def test_arguments_that_do_not_fit_are_refused(quantizer: Quantizer) -> None:
    x = rows(3, 64).to(quantizer.grid.device)
    codes, scale = plain.higgs_encode(x, quantizer, 64)
    with pytest.raises(ValueError, match="codes is"):
        higgs_decode_add(x, codes[:, 8:], scale, quantizer, out=x)
    with pytest.raises(ValueError, match="base is"):
        higgs_decode_add(x.half(), codes, scale, quantizer, out=x)
    with pytest.raises(ValueError, match="64 channels do not divide into 3 groups"):
        higgs_decode_add(x, codes, scale.expand(-1, 3).contiguous(), quantizer, out=x)
    with pytest.raises(ValueError, match="group is 48"):
        higgs_encode(x, quantizer, 48)
    with pytest.raises(ValueError, match="groups of 128"):
        higgs_encode(x, quantizer, 128)
