"""Bit packing of grid indices, little-endian within a row.

Indices of 4 bits lie two to a byte, of 6 bits four to three bytes, of 8 bits one to a byte. Decoding needs
no single indices: it looks up *words*, the smallest units whose bits are easy to reach (a byte, or 12 bits
holding two 6-bit indices), in a table that maps a word straight to all its values.
"""

import torch
from torch import Tensor

INDEX_BITS = (4, 6, 8)


def pack(indices: Tensor, bits: int) -> Tensor:
    """uint8 [T, M] of values below 2^bits to uint8 [T, M*bits/8].

    Raises ValueError for other widths and where a row does not fill whole bytes (6 bits: units of 3 bytes).
    """
    _check_width(bits)
    if indices.shape[1] % indices_per_unit(bits):
        raise ValueError(f"{indices.shape[1]} indices of {bits} bits do not fill whole bytes")
    if bits == 8:
        return indices
    if bits == 4:
        return indices[:, 0::2] | (indices[:, 1::2] << 4)
    a, b, c, d = (indices[:, i::4] for i in range(4))
    return torch.stack((a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)), dim=2).flatten(1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`."""
    _check_width(bits)
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)
    x, y, z = (packed[:, i::3] for i in range(3))
    parts = (x & 63, (x >> 6) | ((y & 15) << 2), (y >> 4) | ((z & 3) << 4), z >> 2)
    return torch.stack(parts, dim=2).flatten(1)


def words(packed: Tensor, bits: int) -> Tensor:
    """int32 [T, W] of the words in packed rows: 8 bits each, 12 where indices have 6."""
    _check_width(bits)
    wide = packed.int()
    if bits != 6:
        return wide
    x, y, z = (wide[:, i::3] for i in range(3))
    return torch.stack((x | ((y & 15) << 8), (y >> 4) | (z << 4)), dim=2).flatten(1)


def word_values(grid: Tensor, bits: int) -> Tensor:
    """[words, values per word]: what each word decodes to. grid: [2^bits, d]."""
    _check_width(bits)
    if bits == 8:
        return grid.contiguous()
    low = grid.repeat(len(grid), 1)
    high = grid.repeat_interleave(len(grid), dim=0)
    return torch.cat((low, high), dim=1).contiguous()


def indices_per_unit(bits: int) -> int:
    """How many indices fill a whole number of bytes."""
    return {4: 2, 6: 4, 8: 1}[bits]


def _check_width(bits: int) -> None:
    if bits not in INDEX_BITS:
        raise ValueError(f"indices are packed with {INDEX_BITS} bits, not {bits}")
