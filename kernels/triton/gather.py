"""Stored slices from page-locked host memory into one buffer on the device.

A layer of a document lies in the arena in one slice of about a hundred kilobytes per segment. A copy per
slice costs more in launches than in bytes, and collecting them on a CPU costs a pass over host memory that
one thread makes slower than PCIe is. So a kernel reads the slices where they lie: host memory registered with
CUDA has one address for both sides.

Bytes moved: each byte once over PCIe and once into device memory. Few programs with much to read at a time
are enough to fill the bus, and leave the rest of the device to the arithmetic that runs beside them. On an
H200 eight of 64 KB take 1.4 ms for 67 MB and add 1 % to 2.0 ms of GEMMs, 16 of 16 KB take twice as long
beside them, and 32 of 16 KB slow them down by 30 % if they get a multiprocessor each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.triton.checks import expect, expect_power_of_two


@triton.jit
def _gather(
    records: tl.tensor,
    starts: tl.tensor,
    places: tl.tensor,
    sizes: tl.tensor,
    target: tl.tensor,
    num_chunks: tl.tensor,
    chunks_per_slice: tl.tensor,
    WORDS: tl.constexpr,
) -> None:
    """Chunks of WORDS words of 4 bytes, in turns with the other programs. Slices and their places begin at
    multiples of 16 bytes, the widest load of a thread."""
    lane = tl.arange(0, WORDS)
    chunk = tl.program_id(0)
    while chunk < num_chunks:
        piece = chunk // chunks_per_slice
        word = (chunk % chunks_per_slice) * WORDS + lane
        record = tl.load(records + piece)
        size = tl.where(record == 0, 0, tl.load(sizes + piece))
        # Told what sizes and addresses are multiples of, the compiler loads 16 bytes at a time.
        there = word < tl.multiple_of(size // 4, 4)
        source = (record + tl.load(starts + piece)).to(tl.pointer_type(tl.int32))
        place = (target + tl.load(places + piece)).to(tl.pointer_type(tl.int32))
        data = tl.load(tl.multiple_of(source, 16) + word, mask=there)
        tl.store(tl.multiple_of(place, 16) + word, data, mask=there)
        chunk += tl.num_programs(0)


def gather_slices(
    records: Tensor,
    starts: Tensor,
    places: Tensor,
    sizes: Tensor,
    largest: int,
    target: Tensor,
    *,
    programs: int = 8,
    block_bytes: int = 65536,
) -> None:
    """Copy a slice of each of some records in host memory to its place in `target`.

    records: int64 [N], addresses that the device can read; what lies there must stay as it is until the
    kernel has run. 0: there is no such record, and nothing is copied
    starts, places, sizes: int32 [N], of the slices in records and target, in bytes, multiples of 16 like the
    addresses
    largest: the largest of the sizes
    target: uint8 [B]; programs, block_bytes: how many share the work, and in which portions
    Twin: gather_slices_ref.
    """
    (count,) = records.shape
    expect("records", records, (None,), torch.int64)
    expect("starts", starts, (count,), torch.int32)
    expect("places", places, (count,), torch.int32)
    expect("sizes", sizes, (count,), torch.int32)
    expect("target", target, (None,), torch.uint8)
    expect_power_of_two("block_bytes", block_bytes, 512, 65536)
    chunks = triton.cdiv(largest, block_bytes)
    _gather[(min(programs, count * chunks),)](
        records, starts, places, sizes, target, count * chunks, chunks, WORDS=block_bytes // 4, num_warps=16
    )


def gather_slices_ref(slices: list[Tensor], places: list[int], target: Tensor) -> None:
    """The same from tensors."""
    for piece, place in zip(slices, places, strict=True):
        target[place : place + len(piece)] = piece
