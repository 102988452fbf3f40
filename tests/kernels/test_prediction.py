"""Predictions in integers against the same maps in float64."""

import pytest
import torch
from torch import Tensor

from aquifer.kernels.prediction import IntegerLinear, Rounding

CHANNELS = 96


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def roundings() -> tuple[Rounding, Rounding]:
    """Of keys with a large mean, and of small values."""
    return Rounding.of(30 * normal(CHANNELS, seed=1), 2.0), Rounding.of(normal(CHANNELS, seed=2), 0.01)


@pytest.fixture
def state(roundings: tuple[Rounding, Rounding]) -> Tensor:
    keys, values = roundings
    rows = normal(200, 2 * CHANNELS, seed=3)
    return torch.cat((keys.centre + 2 * rows[:, :CHANNELS], values.centre + 0.01 * rows[:, CHANNELS:]), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_predict_almost_as_floats_do(
    dtype: torch.dtype, state: Tensor, roundings: tuple[Rounding, Rounding]
) -> None:
    """Each half counts as much as the other, however small its values are."""
    weight, bias = normal(2 * CHANNELS, CHANNELS, seed=4), normal(CHANNELS, seed=5)
    weight[CHANNELS:] *= 200
    linear = IntegerLinear.of(weight, bias, roundings)
    state = state.to(dtype)
    expected = state.double() @ weight.double() + bias
    deviation = expected - expected.mean(dim=0)
    missed = (linear(state) - expected).square().sum() / deviation.square().sum()
    assert missed < 4e-4  # 8-bit floats: 13e-4


def test_rounding_keeps_means_and_clamps_what_is_far_away() -> None:
    rounding = Rounding.of(torch.tensor([5.0, -1.0]), 127 / 5)  # steps of one
    rows = torch.tensor([[5.0, -1.0], [7.4, -1.6], [1e9, -1e9], [7.5, -2.5]])
    assert rounding(rows).tolist() == [[0, 0], [2, -1], [127, -127], [2, -2]]  # halves go to the even number


def test_the_mean_of_the_inputs_predicts_the_mean_exactly(roundings: tuple[Rounding, Rounding]) -> None:
    weight = normal(2 * CHANNELS, CHANNELS, seed=6)
    weight[:, 7] = 0
    linear = IntegerLinear.of(weight, normal(CHANNELS, seed=7), roundings)
    means = torch.cat([rounding.centre for rounding in roundings])[None]
    assert torch.equal(linear(means), linear.bias[None])
    elsewhere = linear(means + 1)
    assert elsewhere.isfinite().all() and elsewhere[0, 7] == linear.bias[7]


def test_values_without_spread_are_refused() -> None:
    with pytest.raises(ValueError, match=r"spread by 0\.0"):
        Rounding.of(torch.zeros(2), 0.0)
