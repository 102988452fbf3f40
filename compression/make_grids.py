"""Make the grids that HIGGS rounds to: `python -m aquifer.compression.make_grids`.

A grid is n points in d dimensions with the least mean-squared error for N(0, I_d). Lloyd's iteration
moves every point to the centroid of its cell; each iteration draws fresh samples, so the grid fits the
distribution and not one sample. Lloyd only finds a local optimum: the start is spread like the optimal
point density, N(0, (d+2)/d), and the best of several starts is kept. (60 iterations from N(0, 1) end 5 %
too high at n = 256.) Takes some minutes on two cores; the result is shipped, so nobody needs to.
"""

import torch
from safetensors.torch import save
from torch import Tensor

from aquifer.compression.gaussian import GRIDS_FILE, SHAPES, Shape
from aquifer.kernels.higgs import nearest_ref

ITERATIONS = 600
RESTARTS = 4
SAMPLES = 1 << 17
FINAL_ITERATIONS = 5
FINAL_SAMPLES = 1 << 20
"""Samples of each of the last iterations, and of the error by which restarts are compared."""


def lloyd(
    shape: Shape, generator: torch.Generator, iterations: int = ITERATIONS, samples: int = SAMPLES
) -> Tensor:
    """One start. Returns [n, d] float32."""
    spread = ((shape.d + 2) / shape.d) ** 0.5
    grid = torch.randn(shape.n, shape.d, generator=generator) * spread
    for iteration in range(iterations):
        count = FINAL_SAMPLES if iteration >= iterations - FINAL_ITERATIONS else samples
        points = torch.randn(count, shape.d, generator=generator)
        index = nearest_ref(points, grid)
        hits = torch.bincount(index, minlength=shape.n).unsqueeze(1)
        total = torch.zeros_like(grid).index_add_(0, index, points)
        # An empty cell moves beside a random sample; the following iterations pull it into place.
        grid = torch.where(hits > 0, total / hits.clamp(min=1), points[: shape.n])
    return grid


def mean_squared_error(grid: Tensor, samples: Tensor) -> float:
    """Error per coordinate of rounding samples [N, d] to the grid [n, d]."""
    return (samples - grid[nearest_ref(samples, grid)]).square().mean().item()


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    best: dict[str, Tensor] = {}
    for shape in SHAPES:
        samples = torch.randn(FINAL_SAMPLES, shape.d, generator=generator)
        starts = [lloyd(shape, generator) for _ in range(RESTARTS)]
        errors = [mean_squared_error(grid, samples) for grid in starts]
        best[shape.name] = starts[errors.index(min(errors))]
        print(f"{shape.name}: {shape.bits} bits, error {min(errors):.5f} (starts: {errors})")
    GRIDS_FILE.write_bytes(save(best))


if __name__ == "__main__":
    main()
