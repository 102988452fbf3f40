"""HIGGS: one scale per group of rotated values, and the nearest point of a Gaussian grid.

Encoding reads 4 bytes per value and writes bits/8 plus 2/G; decoding the reverse. Both are bound by memory
and table look-ups, so neither computes distances: a cell table gives the nearest grid point of a small cube,
and a word table gives the values of a whole byte of indices.

Source: HIGGS, arXiv 2411.17525.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from aquifer.kernels.packing import pack, unpack, word_values, words

# Cells per axis and reach of the cell table, by grid dimension. A point near the border of two grid points
# may get the second nearest: the mean-squared error rises by 0.05 % (d2 n16) to 0.4 % (d2 n256), and by 3 %
# for the 4-d grid, whose table would otherwise outgrow the cache. An exact search costs ten times the time.
CELLS = {2: (512, 5.0), 4: (32, 3.0)}


@dataclass(frozen=True)
class Quantizer:
    """A grid and its tables, on one device."""

    grid: Tensor
    """float32 [n, d]"""
    index_bits: int
    word_values: Tensor
    """float32 [words, values per word]"""
    cells: Tensor
    """uint8 [cells^d]: grid index of the point nearest to the centre of each cell."""
    table: Tensor
    """[n, d]: the grid as a kernel looks it up, float32, or int8 for one in steps."""
    step: float
    """What the table's entries are multiples of."""

    @classmethod
    def of(cls, grid: Tensor, device: torch.device, *, in_steps: bool = False) -> Self:
        """Tables for grid [n, d] with n = 16, 64 or 256, d = 2 or 4.

        in_steps: move the grid to multiples of 1/127 of its largest coordinate, so that a kernel looks it up
        in a quarter of the memory. The mean-squared error rises by 0.07 % (d4 n256) to 1.2 % (d2 n256).
        """
        n, d = grid.shape
        table, step = grid, 1.0
        if in_steps:
            step = grid.abs().max().item() / 127
            table = (grid / step).round().to(torch.int8)
            grid = table * step
        index_bits = n.bit_length() - 1
        count, reach = CELLS[d]
        axis = (torch.arange(count) + 0.5) * (2 * reach / count) - reach
        centres = torch.cartesian_prod(*[axis] * d)
        return cls(
            grid=grid.to(device),
            index_bits=index_bits,
            word_values=word_values(grid, index_bits).to(device),
            cells=nearest_ref(centres, grid).to(torch.uint8).to(device),
            table=table.to(device),
            step=step,
        )

    @property
    def dimension(self) -> int:
        return self.grid.shape[1]

    def look_up(self, codes: Tensor) -> Tensor:
        """What packed rows stand for before they are scaled: uint8 [T, C*bits/8] to float32 [T, C]."""
        # The values of a word go as one opaque number: gathering short rows takes three times as long.
        opaque = {2: torch.complex64, 4: torch.complex128}[self.word_values.shape[1]]
        table = self.word_values.view(opaque).squeeze(1)
        flat = words(codes, self.index_bits).flatten()
        return table.index_select(0, flat).view(torch.float32).view(len(codes), -1)

    def code_bytes(self, channels: int) -> int:
        """Bytes of one packed row of C values. Raises ValueError unless they are whole."""
        if channels % 8:
            raise ValueError(f"rows are coded in units of 8 values; {channels} channels do not divide")
        return channels // self.dimension * self.index_bits // 8


def higgs_encode(x: Tensor, quantizer: Quantizer, group: int) -> tuple[Tensor, Tensor]:
    """Round rotated values to the grid.

    x: [T, C] float32, any finite values; G = group divides C
    Returns codes uint8 [T, C*bits/8] and scale float16 [T, C/G], the RMS of each group (at most 65504).
    A group of zeros gets the scale 0.
    Twin: higgs_encode_ref.
    """
    tokens, channels = x.shape
    groups = x.unflatten(1, (channels // group, group))
    scale = _rms(groups)
    count, reach = CELLS[quantizer.dimension]
    to_cells = _inverse(scale).mul_(count / (2 * reach))
    # Truncation rounds down, since coordinates outside of the table, negative ones too, are clamped.
    cell = (groups * to_cells.unsqueeze(-1)).add_(count / 2).int().clamp_(0, count - 1)
    flat = _flatten_cells(cell, quantizer.dimension, count)
    index = quantizer.cells.index_select(0, flat).view(tokens, channels // quantizer.dimension)
    return pack(index, quantizer.index_bits), scale


def higgs_decode_add(base: Tensor, codes: Tensor, scale: Tensor, quantizer: Quantizer, out: Tensor) -> None:
    """out = base + what the codes stand for, still rotated.

    base: float32 [T, C]; codes: uint8 [T, C*bits/8]; scale: float16 [T, C/G]; out: [T, C], any float dtype
    Computes in float32 and rounds once. Twin: higgs_decode_ref.
    """
    values = quantizer.look_up(codes).view(*scale.shape, -1)
    groups = values.shape[1:]
    wide = scale.float().unsqueeze(-1)
    torch.addcmul(base.unflatten(1, groups), values, wide, out=out.unflatten(1, groups))


def higgs_encode_ref(x: Tensor, grid: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """higgs_encode with an exact search."""
    groups = x.view(len(x), -1, group)
    scale = _rms(groups)
    points = (groups * _inverse(scale).unsqueeze(-1)).view(-1, grid.shape[1])
    index = nearest_ref(points, grid).to(torch.uint8).view(len(x), -1)
    return pack(index, len(grid).bit_length() - 1), scale


def higgs_decode_ref(codes: Tensor, scale: Tensor, grid: Tensor) -> Tensor:
    """What codes stand for, float32 [T, C], index by index."""
    index = unpack(codes, len(grid).bit_length() - 1).long()
    return (grid[index].view(*scale.shape, -1) * scale.unsqueeze(-1)).view(len(codes), -1)


def nearest_ref(points: Tensor, grid: Tensor) -> Tensor:
    """int64 [N]: the nearest row of grid [n, d] for each row of points [N, d], by brute force."""
    half_norm = grid.square().sum(dim=1).mul_(-0.5)
    # |p - g|² = |p|² - 2 (p.g - |g|²/2); in blocks, so that the products stay in cache.
    return torch.cat([torch.addmm(half_norm, block, grid.T).argmax(dim=1) for block in points.split(2048)])


def _rms(groups: Tensor) -> Tensor:
    rms = torch.linalg.vector_norm(groups, dim=-1).mul_(groups.shape[-1] ** -0.5)
    return rms.clamp_(max=torch.finfo(torch.float16).max).half()


def _inverse(scale: Tensor) -> Tensor:
    wide = scale.float()
    return torch.where(wide > 0, wide.reciprocal(), 0.0)


def _flatten_cells(cell: Tensor, dimension: int, count: int) -> Tensor:
    """int32 numbers of cells whose coordinates lie side by side, by joining neighbours pair by pair."""
    flat, radix = cell.flatten(), count
    while dimension > 1:
        pairs = flat.view(-1, 2)
        flat = torch.add(pairs[:, 1], pairs[:, 0], alpha=radix)
        dimension, radix = dimension // 2, radix * radix
    return flat
