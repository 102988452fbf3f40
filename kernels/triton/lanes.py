"""What the kernels of selective decoding know of each request: counts, and the addresses of its memory.

Requests come, go and differ in length, but a CUDA graph reads the same addresses and starts the same number
of programs each time. So all that belongs to one request lies in tensors of its own, and a small table of
int64 [B, fields] says where. It is all that the host fills before a step. Rows of zeros belong to nobody, and
every kernel skips them.

Tokens of a request are numbered from 0, sinks included. Sets of tokens are numbered 0..S-1: one per KV head,
or one for all. Fetched rows stay as they were packed: the row of a token and head lies in a cell, its key's
codes among the pool's keys and its value's codes among the values. A slot of the pool has room for several
cells. The cells of a request are numbered from 0, behind the sinks in its row pages; for the others those of
the whole pool.

A request has fewer cells than tokens, which take turns in them, or a cell for every token: its own, behind
that of the token before.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class LaneRow(NamedTuple):
    """One request in the table. Names ending in _at are addresses of contiguous memory on the device."""

    tokens: int
    """In whole segments, sinks included: those that may be chosen."""
    wanted: int
    """Tokens to choose per set, at most those that may be chosen."""
    cells: int
    """In which tokens take turns, at least `wanted`; 0: every token has its own."""
    loaded: int
    """Layers of which all rows are on the device, from the first on; where every token has its own cell."""
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
    """float32 [Hq, tokens], until tokens are chosen: then what is left of them is scratch."""
    keys_at: int
    """int16 [S, tokens * 11 / 8], per set: ranks of all tokens as whole numbers below 65,536, of which the
    smallest are chosen; the smallest of every 8 of them; and int32 [tokens / 8], scratch: which of those
    groups of 8 are worth a look."""
    chosen_at: int
    """int32 [S, wanted]: tokens, ascending."""
    missing_at: int
    """int32 [S, wanted]: the chosen tokens whose rows have to be fetched, ascending."""
    targets_at: int
    """int32 [S, wanted]: cells of the pool where those rows go."""
    row_cells_at: int
    """int32 [S, wanted]: cells of the pool where the rows of the chosen tokens are, if tokens take turns."""
    cell_of_at: int
    """int32 [L, S, tokens]: cell of a token's row; -1: it is not on the device."""
    token_in_at: int
    """int32 [L, S, cells]: token whose row lies in a cell, or -1."""
    last_used_at: int
    """int32 [L, S, cells]: step in which a cell was wanted last, or -1."""


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
        cells: int,
        device: torch.device,
    ) -> None:
        """index_pages: of the index, one per whole segment. tail_pages: of the pool, for what comes after.
        row_pages: of the pool, for sinks and fetched rows. layers: of which rows may have to be looked up.
        wanted, cells: see LaneRow."""
        tokens = PAGE.value * len(index_pages)

        def numbers(*shape: int) -> Tensor:
            return torch.full(shape, -1, dtype=torch.int32, device=device)

        self.wanted, self.cells = wanted, cells
        self.index_pages, self.tail_pages, self.row_pages = (
            torch.tensor(pages, dtype=torch.int32, device=device)
            for pages in (index_pages, tail_pages, row_pages)
        )
        self.scores = torch.empty(num_q_heads, tokens, device=device)
        self.keys = torch.empty(sets, tokens * 11 // 8, dtype=torch.int16, device=device)
        self.chosen, self.missing, self.targets, self.row_cells = (numbers(sets, wanted) for _ in range(4))
        self.cell_of = numbers(layers, sets, tokens)
        self.token_in, self.last_used = (numbers(layers, sets, cells) for _ in range(2))

        memory = (
            self.index_pages,
            self.tail_pages,
            self.row_pages,
            self.scores,
            self.keys,
            self.chosen,
            self.missing,
            self.targets,
            self.row_cells,
            self.cell_of,
            self.token_in,
            self.last_used,
        )
        self._row = LaneRow(tokens, wanted, cells, 0, 0, 0, *(tensor.data_ptr() for tensor in memory))

    def row(self, step: int, tail: int, loaded: int = 0) -> LaneRow:
        """What the table says of this request in one step; see LaneRow."""
        return self._row._replace(step=step, tail=tail, loaded=loaded)

    @property
    def nbytes(self) -> int:
        """Device bytes of everything but the pages."""
        tensors = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)


PAGE = tl.constexpr(256)
FIELDS = tl.constexpr(len(LaneRow._fields))
TOKENS, WANTED, CELLS, LOADED, STEP, TAIL = (tl.constexpr(number) for number in range(6))
INDEX_PAGES, TAIL_PAGES, ROW_PAGES = (tl.constexpr(number) for number in range(6, 9))
SCORES, KEYS, CHOSEN, MISSING, TARGETS, ROW_CELLS = (tl.constexpr(number) for number in range(9, 15))
CELL_OF, TOKEN_IN, LAST_USED = (tl.constexpr(number) for number in range(15, 18))


@triton.jit
def number(lanes: tl.tensor, request: tl.tensor, FIELD: tl.constexpr) -> tl.tensor:
    """A count of a request."""
    count = tl.load(lanes + request * FIELDS + FIELD).to(tl.int32)
    if FIELD == TOKENS:  # the compiler forgets what is said of the result elsewhere
        count = tl.multiple_of(count, PAGE)
    return count


@triton.jit
def memory(lanes: tl.tensor, request: tl.tensor, FIELD: tl.constexpr, ELEMENT: tl.constexpr) -> tl.tensor:
    """A pointer to elements of a request, which begin where torch's memory does."""
    return tl.multiple_of(tl.load(lanes + request * FIELDS + FIELD).to(tl.pointer_type(ELEMENT)), 16)


@triton.jit
def pool_cell(
    row_pages: tl.tensor, cell: tl.tensor, there: tl.tensor, SINKS: tl.constexpr, PER_SLOT: tl.constexpr
) -> tl.tensor:
    """Cells of the pool for cells of a request, which begin behind its sinks."""
    cell += SINKS * PER_SLOT
    page = tl.load(row_pages + cell // (PAGE * PER_SLOT), mask=there, other=0)
    return page * (PAGE * PER_SLOT) + cell % (PAGE * PER_SLOT)
