"""The shipped grids: MSE-optimal points for Gaussian values (see make_grids)."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

GRIDS_FILE = Path(__file__).parent / "grids" / "gaussian.safetensors"


@dataclass(frozen=True)
class Shape:
    """n points in d dimensions."""

    d: int
    n: int

    @property
    def name(self) -> str:
        return f"d{self.d}n{self.n}"

    @property
    def bits(self) -> int:
        """Bits per value: log2(n) / d."""
        return (self.n.bit_length() - 1) // self.d


SHAPES = (Shape(2, 16), Shape(4, 256), Shape(2, 64), Shape(2, 256))


@cache
def load_grid(name: str) -> Tensor:
    """The grid called "d2n16", "d4n256", "d2n64" or "d2n256": float32 [n, d] on the CPU."""
    return load_file(GRIDS_FILE)[name]


def grid_digest(name: str) -> str:
    """SHA-256 of a grid's bytes, in hex."""
    return hashlib.sha256(load_grid(name).numpy().tobytes()).hexdigest()
