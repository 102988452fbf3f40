"""How half of a layer is predicted from a state [T, 2C], keys beside values: three ways, in plain PyTorch.

`Linear` multiplies in the state's dtype. `IntegerLinear` rounds state and weights to int8, which a GPU
multiplies twice as fast. A rotated state is close to Gaussian in every channel, so even steps about its mean
fit it better than 8-bit floats do, and sums of integers are the same in any order and on any device.

Twin of the GEMMs: kernels/triton/chain.py.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

LARGEST = 127
"""Of an int8, in both directions."""

REACH = 5.0
"""Standard deviations that int8 covers; beyond them a value is clamped. 4 and 6 predict worse."""


class Prediction(Protocol):
    @property
    def bias(self) -> Tensor:
        """float32 [C]"""
        ...

    def __call__(self, state: Tensor) -> Tensor:
        """float32 [T, C], from state [T, 2C] in the codec dtype."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same for every token."""

    bias: Tensor

    def __call__(self, state: Tensor) -> Tensor:
        return self.bias.expand(len(state), -1)


@dataclass(frozen=True)
class Linear:
    """state @ weight + bias, summed in float32."""

    weight: Tensor
    """[2C, C] in the codec dtype."""
    bias: Tensor

    def __call__(self, state: Tensor) -> Tensor:
        if state.dtype == torch.float32:
            return torch.addmm(self.bias, state, self.weight)
        if state.is_cuda:
            return torch.mm(state, self.weight, out_dtype=torch.float32).add_(self.bias)
        return torch.addmm(self.bias, state.float(), self.weight.float())


@dataclass(frozen=True)
class Rounding:
    """How one half of a state becomes int8."""

    centre: Tensor
    """float32 [C]: its mean."""
    factor: float
    """Steps per unit."""

    @classmethod
    def of(cls, centre: Tensor, spread: float) -> Self:
        """spread: standard deviation about the centre. Raises ValueError unless it is above 0."""
        if not spread > 0:
            raise ValueError(f"values that spread by {spread} cannot be rounded to int8")
        return cls(centre, LARGEST / (REACH * spread))

    def __call__(self, rows: Tensor) -> Tensor:
        """int8 [T, C], from rows [T, C] of any float dtype."""
        steps = ((rows.float() - self.centre) * self.factor).clamp_(-LARGEST, LARGEST)
        return steps.round_().to(torch.int8)


class Copy(NamedTuple):
    """An int8 copy of half of a state, which a kernel writes beside it."""

    rows: Tensor
    """int8 [T, C], rows may be strided."""
    rounding: Rounding


@dataclass(frozen=True)
class IntegerLinear:
    """(rounded state @ weight) * scale + bias, summed in integers."""

    weight: Tensor
    """int8 [C, 2C], a row per output: matrix units read 8-bit numbers along the sum only."""
    scale: Tensor
    """float32 [C]"""
    bias: Tensor
    """float32 [C]: the mean of what is predicted, because deviations from means are multiplied."""
    inputs: tuple[Rounding, Rounding]
    """Of keys and of values."""

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, inputs: tuple[Rounding, Rounding]) -> Self:
        """The same map as Linear(weight, bias), but for the rounding. weight: [2C, C], any float dtype."""
        keys, values = inputs
        mean = torch.cat((keys.centre, values.centre)).double() @ weight.double() + bias.double()
        steps = [
            half / rounding.factor for half, rounding in zip(weight.float().chunk(2), inputs, strict=True)
        ]
        by_output = torch.cat(steps).T.contiguous()
        # A column of zeros stays one.
        scale = (by_output.abs().amax(dim=1) / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        return cls((by_output / scale[:, None]).round_().to(torch.int8), scale, mean.float(), inputs)

    def __call__(self, state: Tensor) -> Tensor:
        halves = zip(self.inputs, state.chunk(2, dim=1), strict=True)
        rounded = torch.cat([rounding(half) for rounding, half in halves], dim=1)
        # Float32 holds these sums exactly below 2^24, some hundred times what Gaussian values add up to.
        return torch.addcmul(self.bias, rounded.float() @ self.weight.float().T, self.scale)
