"""Where calibration reads keys and values: layer by layer, so that only one layer is ever in memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from aquifer.compression.chain import Half


class LayerSource(Protocol):
    """Pre-RoPE keys and values of a corpus. Sink tokens do not belong in it: no codec ever sees them."""

    def rows(self, layer: int, half: Half) -> Iterator[Tensor]:
        """Batches [T, C] of one layer's keys or values: the same tokens in the same batches every time."""
        ...


class HeldSource:
    """Sequences held in memory."""

    def __init__(self, sequences: list[tuple[Tensor, Tensor]]) -> None:
        """sequences: keys and values [L, T, C] of each."""
        self._sequences = sequences

    def rows(self, layer: int, half: Half) -> Iterator[Tensor]:
        for sequence in self._sequences:
            yield sequence[half][layer]


class SpilledSource:
    """Sequences in a folder: one file each, of which only the layer asked for is read.

    For models whose KV of a whole corpus fits no memory (100 GB for 300,000 tokens of a 70B model).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._files = sorted(folder.glob("*.safetensors"))

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write one sequence, keys and values [L, T, C]."""
        file = self._folder / f"{len(self._files):08d}.safetensors"
        tensors = {
            _name(layer, half): rows.to("cpu", copy=True)
            for half, layers in zip(Half, (keys, values), strict=True)
            for layer, rows in enumerate(layers)
        }
        save_file(tensors, file)
        self._files.append(file)

    def rows(self, layer: int, half: Half) -> Iterator[Tensor]:
        for file in self._files:
            with safe_open(file, framework="pt") as tensors:
                yield tensors.get_tensor(_name(layer, half))


def _name(layer: int, half: Half) -> str:
    return f"{half.name.lower()}.{layer}"
