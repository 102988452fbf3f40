import pytest
import torch
from torch import Tensor

from aquifer.kernels.higgs import (
    Quantizer,
    higgs_decode_add,
    higgs_decode_ref,
    higgs_encode,
    higgs_encode_ref,
)

CPU = torch.device("cpu")
SHAPES = [(16, 2), (256, 4), (64, 2), (256, 2)]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "n{}d{}".format(*shape))
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    return Quantizer.of(torch.randn(request.param, generator=torch.Generator().manual_seed(1)), CPU)


def rows(tokens: int, channels: int) -> Tensor:
    return 3 * torch.randn(tokens, channels, generator=torch.Generator().manual_seed(tokens))


def higgs_decode(codes: Tensor, scale: Tensor, quantizer: Quantizer) -> Tensor:
    base = torch.zeros(len(codes), 8 * codes.shape[1] // quantizer.index_bits * quantizer.dimension)
    out = torch.empty_like(base)
    higgs_decode_add(base, codes, scale, quantizer, out)
    return out


@pytest.mark.parametrize(("tokens", "channels", "group"), [(1, 8, 8), (7, 96, 32), (300, 256, 256)])
def test_decoding_equals_its_twin(quantizer: Quantizer, tokens: int, channels: int, group: int) -> None:
    codes, scale = higgs_encode(rows(tokens, channels), quantizer, group)
    assert codes.shape == (tokens, quantizer.code_bytes(channels)) and codes.dtype == torch.uint8
    assert scale.shape == (tokens, channels // group) and scale.dtype == torch.float16
    expected = higgs_decode_ref(codes, scale, quantizer.grid)
    assert torch.equal(higgs_decode(codes, scale, quantizer), expected)
    base, wide = torch.randn(tokens, channels), torch.zeros(tokens, 2 * channels, dtype=torch.bfloat16)
    higgs_decode_add(base, codes, scale, quantizer, out=wide[:, channels:])
    torch.testing.assert_close(wide[:, channels:], (base + expected).bfloat16())
    assert not wide[:, :channels].any()


def test_the_cell_table_costs_little_against_an_exact_search(quantizer: Quantizer) -> None:
    x = rows(2000, 256)
    error = {
        encode: (x - higgs_decode(*encoded, quantizer)).square().mean().item()
        for encode, encoded in {
            "cells": higgs_encode(x, quantizer, 256),
            "exact": higgs_encode_ref(x, quantizer.grid, 256),
        }.items()
    }
    bound = 1.04 if quantizer.dimension == 4 else 1.01
    assert error["exact"] <= error["cells"] <= bound * error["exact"]


def test_a_group_has_its_own_scale(quantizer: Quantizer) -> None:
    x = rows(50, 64)
    x[:, :32] *= 1e-3
    codes, scale = higgs_encode(x, quantizer, 32)
    wrong = (higgs_decode(codes, scale, quantizer) - x).view(50, 2, 32).square().mean(dim=(0, 2))
    assert wrong[0] < 1e-5 * wrong[1]


def test_zeros_decode_to_zeros_and_huge_values_stay_finite(quantizer: Quantizer) -> None:
    x = rows(3, 64)
    x[0] = 0
    x[1] = 1e30
    codes, scale = higgs_encode(x, quantizer, 64)
    found = higgs_decode(codes, scale, quantizer)
    assert not found[0].any() and found.isfinite().all()


def test_rows_that_do_not_fill_bytes_are_refused(quantizer: Quantizer) -> None:
    with pytest.raises(ValueError, match="units of 8"):
        quantizer.code_bytes(12)
