import pytest
import torch

from aquifer.compression.gaussian import SHAPES, Shape, load_grid
from aquifer.compression.make_grids import lloyd, mean_squared_error

# Mean-squared error per coordinate on N(0, 1) of the best grids known.
BEST = {"d2n16": 0.1077, "d4n256": 0.0965, "d2n64": 0.0296, "d2n256": 0.00776}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_shipped_grid_is_within_one_percent_of_the_best_known(shape: Shape) -> None:
    grid = load_grid(shape.name)
    assert grid.shape == (shape.n, shape.d)
    samples = torch.randn(400_000, shape.d, generator=torch.Generator().manual_seed(99))
    assert mean_squared_error(grid, samples) <= 1.01 * BEST[shape.name]


def test_the_maker_finds_the_one_bit_quantizer() -> None:
    """For n = 2, d = 1 the optimum is known: ±sqrt(2/π)."""
    grid = lloyd(Shape(1, 2), torch.Generator().manual_seed(0), iterations=20, samples=1 << 14)
    torch.testing.assert_close(grid.flatten().sort().values, torch.tensor([-0.798, 0.798]), atol=0.02, rtol=0)
