"""What the kernels of selective decoding know of each request: counts, and the addresses of its memory.

Requests come, go and differ in length, but a CUDA graph reads the same addresses and starts the same number
of programs each time. So all that belongs to one request lies in tensors of its own, and a small table of
int64 [B, fields] says where. It is all that the host fills before a step. Rows of zeros belong to nobody, and
every kernel skips them.

Tokens of a request are numbered from 0, sinks included. Slots of fetched rows are numbered from 0, behind the
sinks in the request's row pages. Sets of tokens are numbered 0..S-1: one per KV head, or one for all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.triton.checks import expect


class LaneRow(NamedTuple):
    """One request in the table. Names ending in _at are addresses of contiguous memory on the device."""

    tokens: int
    """In whole segments, sinks included: those that may be chosen."""
    wanted: int
    """Tokens to choose per set, at most those that may be chosen."""
    slots: int
    """For fetched rows, at least `wanted`."""
    step: int
    """Number of the step, from 1."""
    tail: int
    """Tokens behind the whole segments, the new one included."""
    index_pages_at: int
    """int32 [tokens / 256]: pages of the index."""
    tail_pages_at: int
    """int32: pages of the pool that hold the tail."""
    row_pages_at: int
    """int32: pages of the pool that hold the sinks and fetched rows."""
    scores_at: int
    """float32 [Hq, tokens]"""
    keys_at: int
    """int16 [S, tokens]: ranks as whole numbers below 65,536; the smallest are chosen."""
    chosen_at: int
    """int32 [S, wanted]: tokens, ascending."""
    missing_at: int
    """int32 [S, wanted]: the chosen tokens whose rows have to be fetched, ascending."""
    targets_at: int
    """int32 [S, wanted]: slots of the pool where those rows go."""
    slot_of_at: int
    """int32 [L, S, tokens]: slot of a token's row, or -1."""
    token_in_at: int
    """int32 [L, S, slots]: token whose row lies in a slot, or -1."""
    last_used_at: int
    """int32 [L, S, slots]: step in which a slot was wanted last, or -1."""


NOBODY = LaneRow(*[0] * len(LaneRow._fields))


class Lane:
    """The memory of one request."""

    def __init__(
        self,
        index_pages: Sequence[int],
        tail_pages: Sequence[int],
        row_pages: Sequence[int],
        *,
        layers: int,
        sets: int,
        num_q_heads: int,
        wanted: int,
        slots: int,
        device: torch.device,
    ) -> None:
        """index_pages: of the index, one per whole segment. tail_pages: of the pool, for what comes after.
        row_pages: of the pool, for sinks and fetched rows. wanted, slots: see LaneRow."""
        tokens = PAGE.value * len(index_pages)

        def numbers(*shape: int) -> Tensor:
            return torch.full(shape, -1, dtype=torch.int32, device=device)

        self.wanted, self.slots = wanted, slots
        self.index_pages, self.tail_pages, self.row_pages = (
            torch.tensor(pages, dtype=torch.int32, device=device)
            for pages in (index_pages, tail_pages, row_pages)
        )
        self.scores = torch.empty(num_q_heads, tokens, device=device)
        self.keys = torch.empty(sets, tokens, dtype=torch.int16, device=device)
        self.chosen, self.missing, self.targets = (numbers(sets, wanted) for _ in range(3))
        self.slot_of = numbers(layers, sets, tokens)
        self.token_in, self.last_used = (numbers(layers, sets, slots) for _ in range(2))

        memory = (
            self.index_pages,
            self.tail_pages,
            self.row_pages,
            self.scores,
            self.keys,
            self.chosen,
            self.missing,
            self.targets,
            self.slot_of,
            self.token_in,
            self.last_used,
        )
        self._row = LaneRow(tokens, wanted, slots, 0, 0, *(tensor.data_ptr() for tensor in memory))

    def row(self, step: int, tail: int) -> LaneRow:
        """What the table says of this request in one step; see LaneRow."""
        return self._row._replace(step=step, tail=tail)

    @property
    def nbytes(self) -> int:
        """Device bytes of everything but the pages."""
        tensors = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)


PAGE = tl.constexpr(256)
FIELDS = tl.constexpr(len(LaneRow._fields))
TOKENS, WANTED, SLOTS, STEP, TAIL = (tl.constexpr(number) for number in range(5))
INDEX_PAGES, TAIL_PAGES, ROW_PAGES = (tl.constexpr(number) for number in range(5, 8))
SCORES, KEYS, CHOSEN, MISSING, TARGETS = (tl.constexpr(number) for number in range(8, 13))
SLOT_OF, TOKEN_IN, LAST_USED = (tl.constexpr(number) for number in range(13, 16))


@triton.jit
def number(lanes: tl.tensor, request: tl.tensor, FIELD: tl.constexpr) -> tl.tensor:
    """A count of a request."""
    return tl.load(lanes + request * FIELDS + FIELD).to(tl.int32)


@triton.jit
def memory(lanes: tl.tensor, request: tl.tensor, FIELD: tl.constexpr, ELEMENT: tl.constexpr) -> tl.tensor:
    """A pointer to elements of a request."""
    return tl.load(lanes + request * FIELDS + FIELD).to(tl.pointer_type(ELEMENT))


@triton.jit
def _lay_out(
    lanes: tl.tensor,
    lists: tl.tensor,
    lengths: tl.tensor,
    set_stride: tl.tensor,
    SINKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The list of one set of one request, as far as it is the same for all layers."""
    own_set, request = tl.program_id(0), tl.program_id(1)
    tail = number(lanes, request, TAIL)
    if tail > 0:
        own = lists + (request * tl.num_programs(0) + own_set) * set_stride
        sink = tl.arange(0, SINKS)
        tl.store(own + sink, tl.load(memory(lanes, request, ROW_PAGES, tl.int32)) * PAGE + sink)
        pages = memory(lanes, request, TAIL_PAGES, tl.int32)
        for at in range(0, tail, BLOCK):
            token = at + tl.arange(0, BLOCK)
            page = tl.load(pages + token // PAGE, mask=token < tail, other=0)
            tl.store(own + SINKS + token, page * PAGE + token % PAGE, mask=token < tail)
    if own_set == 0:
        tl.store(lengths + request, tl.where(tail > 0, SINKS + tail + number(lanes, request, WANTED), 0))


def lay_out(lanes: Tensor, lists: Tensor, lengths: Tensor, *, sinks: int) -> None:
    """Begin the lists of slots that one step attends to: sinks and tail; `find_rows` adds the chosen tokens.

    lanes: int64 [B, fields]
    lists: int32 [B, S, W], to be filled with slots of the pool; lengths: int32 [B], to be filled with how
        many there will be, 0 where there is no request
    sinks: how many there are, a power of two
    """
    requests, sets, _ = lists.shape
    expect("lanes", lanes, (requests, FIELDS.value), torch.int64)
    expect("lists", lists, (None, None, None), torch.int32)
    expect("lengths", lengths, (requests,), torch.int32)
    _lay_out[(sets, requests)](lanes, lists, lengths, lists.stride(1), SINKS=sinks, BLOCK=512, num_warps=4)
