"""The most likely token of each row of logits, in one pass over them.

Bytes moved: every logit read once. A row is split among many programs, because few rows of a large vocabulary
would leave most multiprocessors idle; a second kernel joins what they found.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.triton.checks import expect, expect_power_of_two

MAX_PARTS = 1 << 12
"""Of a row, that one program joins."""


@triton.jit
def _find_best(
    logits: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    places: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One part of one row: its largest logit, where that is, and the sum of exponentials relative to it."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + row * row_stride + column, mask=column < width, other=float("-inf"))
    top, place = tl.max(values, axis=0, return_indices=True)
    base = tl.where(top == float("-inf"), 0.0, top)
    out = row * tl.num_programs(1) + part
    tl.store(tops + out, top)
    tl.store(sums + out, tl.sum(tl.exp(values - base), axis=0))
    tl.store(places + out, tl.minimum(part * BLOCK + place, width - 1))  # among NaN a masked one may win


@triton.jit
def _join_best(
    tops: tl.tensor,
    sums: tl.tensor,
    places: tl.tensor,
    ids: tl.tensor,
    logprobs: tl.tensor,
    count: tl.tensor,
    PARTS: tl.constexpr,
) -> None:
    """One row."""
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    exists, place = part < count, row * count + part
    top = tl.load(tops + place, mask=exists, other=float("-inf"))
    best, winner = tl.max(top, axis=0, return_indices=True)
    total = tl.sum(tl.load(sums + place, mask=exists, other=0.0) * tl.exp(top - best), axis=0)
    tl.store(ids + row, tl.load(places + row * count + tl.minimum(winner, count - 1)))
    tl.store(logprobs + row, -tl.log(total))


def most_likely(logits: Tensor, ids: Tensor, logprobs: Tensor, *, block: int = 1024) -> None:
    """Find the most likely token of each row, of equal ones the first, and its log probability.

    logits: float32 [N, V]; ids: int32 [N] and logprobs: float32 [N], where to write them
    block: logits per program, a power of two
    Twin: aquifer.kernels.greedy.most_likely.
    """
    expect("logits", logits, (None, None), torch.float32)
    rows, width = logits.shape
    expect("ids", ids, (rows,), torch.int32)
    expect("logprobs", logprobs, (rows,), torch.float32)
    expect_power_of_two("block", block, 16, 8192)
    count = triton.cdiv(width, block)
    if count > MAX_PARTS:
        raise ValueError(f"rows of {width} logits are too wide; at most {MAX_PARTS * block}")
    tops, sums = torch.empty(2, rows, count, device=logits.device)
    places = torch.empty(rows, count, dtype=torch.int32, device=logits.device)
    _find_best[(rows, count)](logits, tops, sums, places, width, logits.stride(0), BLOCK=block, num_warps=4)
    parts = triton.next_power_of_2(count)
    _join_best[(rows,)](tops, sums, places, ids, logprobs, count, PARTS=parts, num_warps=4)
