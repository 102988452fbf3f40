"""Bit for bit what the plain code does on a CPU: a segment must not depend on the machine that encoded it."""

import pytest
import torch
from torch import Tensor

from aquifer.compression.aqua import load_quantizer
from aquifer.kernels import higgs as plain
from aquifer.kernels.higgs import Quantizer
from aquifer.kernels.triton.higgs import higgs_encode

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


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_zeros_decode_to_zeros_and_huge_values_stay_finite(quantizer: Quantizer, launched: list[str]) -> None:
    x = rows(3, 64).to(quantizer.grid.device)
    x[0] = 0
    x[1] = 1e30
    found = plain.higgs_decode_ref(*higgs_encode(x, quantizer, 64), quantizer.grid)
    assert not found[0].any() and found.isfinite().all()
    assert launched == ["_encode"]


def test_arguments_that_do_not_fit_are_refused(quantizer: Quantizer) -> None:
    x = rows(3, 64).to(quantizer.grid.device)
    with pytest.raises(ValueError, match="group is 48"):
        higgs_encode(x, quantizer, 48)
    with pytest.raises(ValueError, match="groups of 128"):
        higgs_encode(x, quantizer, 128)
