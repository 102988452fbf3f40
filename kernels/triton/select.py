"""Choosing the tokens of the largest ranks, for sets of many requests at once, in ascending order.

A rank is the largest share of attention that any query head of a set would give a token, as a logarithm. It
is rounded to a whole number of 1/512 (0.2 % of the share; a landmark errs by far more), so that histograms
find the smallest rank that is chosen: no sort, no list that depends on what else is in the batch. Of tokens
with that very rank the first ones are taken.

Three kernels, each cut into chunks of tokens. The first one computes ranks, and counts those that are the
best of 8: where so many of 8 lie below a rank, at least as many tokens do, and at most 8 times as many. So
the second one lists the few tokens that may be chosen, and counts each of their ranks; the third one takes
the first so many of the list. With more than an eighth of all tokens wanted every token is on the list:
slower, not different.

Bytes moved per set: scores once, 4 * T per query head, ranks once, 2 * T, and T / 4 twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.triton.checks import expect, expect_power_of_two
from aquifer.kernels.triton.landmarks import MAX_PARTS
from aquifer.kernels.triton.lanes import CHOSEN, FIELDS, KEYS, SCORES, TOKENS, WANTED, memory, number

PROGRAMS = 1056
"""What the number of chunks of ranks aims at: eight per multiprocessor of an H200, as histograms are slow to
begin. Half as many list tokens, which need the histograms of all chunks."""

MAX_CHUNKS = 32
"""The second kernel reads the histograms of all chunks at once."""

UNIT = tl.constexpr(2048)
"""Chunks are cut at multiples of so many tokens, in all three kernels."""

RESOLUTION = tl.constexpr(512.0)
NEVER = tl.constexpr(65535)
"""Rank of what must not be chosen: sinks, which are attended to anyway."""

GROUP = tl.constexpr(8)
"""Tokens of which the best is counted, and of which the best is kept."""

ONSET = tl.constexpr(3072)
"""Six nats: where bins begin to be told apart. Few tokens have a better rank."""

BINS = tl.constexpr(4096)
"""Ranks that are counted one by one."""


@triton.jit
def _number_of_set() -> tl.tensor:
    """Among those of all requests. The grid is (chunks, sets, requests) in all kernels."""
    return tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def _chunk(tokens: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """First token of this program's chunk, and of the next."""
    length = tl.cdiv(tl.cdiv(tokens, UNIT), tl.num_programs(0)) * UNIT
    first = tl.program_id(0) * length
    return first, tl.minimum(tokens, first + length)


@triton.jit
def _own_ranks(lanes: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """Where the ranks of this program's set begin; see LaneRow.keys_at."""
    own_set = tl.program_id(1).to(tl.int64)
    return memory(lanes, tl.program_id(2), KEYS, tl.int16) + own_set * (tokens // 8 * 11)


@triton.jit
def _unaligned(lanes: tl.tensor, FIELD: tl.constexpr, ELEMENT: tl.constexpr) -> tl.tensor:
    """As `memory`. Threads that load several neighbours at once are not those that store, and what they found
    out would have to travel: so the compiler is not told that they could."""
    return tl.load(lanes + tl.program_id(2) * FIELDS + FIELD).to(tl.pointer_type(ELEMENT))


@triton.jit
def _own_words(lanes: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """Where the ranks of this program's set begin, as int64, four each."""
    return _unaligned(lanes, KEYS, tl.int64) + tl.program_id(1).to(tl.int64) * (tokens // 32 * 11)


@triton.jit
def _own_list(lanes: tl.tensor, tokens: tl.tensor, HEADS: tl.constexpr) -> tl.tensor:
    """Where int32 tokens of this program's set are listed: over its scores, which nobody reads any more."""
    return _unaligned(lanes, SCORES, tl.int32) + tl.program_id(1).to(tl.int64) * HEADS * tokens


@triton.jit
def _bin(rank: tl.tensor) -> tl.tensor:
    """One of 250: all up to the onset and 1/16 nat; 135 of 1/16 nat; and of one nat."""
    above = tl.maximum(rank - ONSET, 0)
    return tl.minimum(above >> 5, 128 + (above >> 9))


@triton.jit
def _edge(bin: tl.tensor) -> tl.tensor:
    """Smallest rank of a bin, but of the first."""
    return tl.minimum(tl.maximum(bin << 5, (bin - 128) << 9) + ONSET, NEVER)


@triton.jit
def _limit(counts: tl.tensor, wanted: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The bin in which the wanted-th token lies, and how many of that bin are wanted.

    counts: tokens per bin, of which the first are wanted."""
    upto = tl.cumsum(counts, 0)
    bin = tl.sum((upto < wanted).to(tl.int32), 0)
    return bin, wanted - tl.max(tl.where(upto < wanted, upto, 0), 0)


@triton.jit
def _halvings(width: tl.tensor) -> tl.tensor:
    """How often a window of ranks is halved until it fits the bins: 0 to 4, as a rule 0."""
    return (
        (width > BINS).to(tl.int32)
        + (width > 2 * BINS).to(tl.int32)
        + (width > 4 * BINS).to(tl.int32)
        + (width > 8 * BINS).to(tl.int32)
    )


@triton.jit(do_not_specialize=["parts"])
def _rank(
    lanes: tl.tensor,
    partial_lse: tl.tensor,
    coarse: tl.tensor,
    fine: tl.tensor,
    windows: tl.tensor,
    first: tl.tensor,
    parts: tl.tensor,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Ranks of one chunk for one set, for which HEADS query heads compete; the best of every 8 neighbours;
    and a histogram of the best of any 8."""
    own_set, request = tl.program_id(1), tl.program_id(2)
    tokens = number(lanes, request, TOKENS)
    if tokens > 0:
        row, part, bins = tl.arange(0, ROWS), tl.arange(0, PARTS), tl.arange(0, 256)
        query_head = own_set * HEADS + row
        place = (request * tl.num_programs(1) * HEADS + query_head)[:, None] * parts + part[None, :]
        there = (row[:, None] < HEADS) & (part[None, :] < parts)
        each = tl.load(partial_lse + place, mask=there, other=float("-inf"))
        top = tl.max(each, axis=1)
        shift = tl.where(row < HEADS, top, 0.0)
        lse = shift + tl.log(tl.maximum(tl.sum(tl.exp(each - shift[:, None]), axis=1), 1e-30))
        if tl.program_id(0) == 0:  # nobody else comes before the next kernel
            tl.store(fine + _number_of_set() * BINS + tl.arange(0, BINS), tl.zeros([BINS], dtype=tl.int32))
            tl.store(windows + _number_of_set() * 3, 0)

        scores = memory(lanes, request, SCORES, tl.float32)
        ranks = _own_ranks(lanes, tokens)
        row_at = query_head.to(tl.int64)[:, None] * tokens
        counts = tl.zeros([256], dtype=tl.int32)
        start, stop = _chunk(tokens)
        for at in range(start, stop, BLOCK):
            token = at + tl.arange(0, BLOCK)
            inside = token < stop
            wanted = (row[:, None] < HEADS) & inside[None, :]
            score = tl.load(scores + row_at + token[None, :], mask=wanted, other=float("-inf"))
            distance = -tl.max(score - lse[:, None], axis=0) * RESOLUTION
            rank = tl.minimum(tl.maximum(distance, 0.0), NEVER - 1.0).to(tl.int32)
            rank = tl.where(inside & (token >= first), rank, NEVER)
            tl.store(ranks + token, rank.to(tl.int16), mask=inside)
            four = tl.min(tl.reshape(rank, [BLOCK // 4, 4]), 1)
            eight = tl.min(tl.reshape(four, [BLOCK // GROUP, 2]), 1)
            group = at // GROUP + tl.arange(0, BLOCK // GROUP)
            tl.store(ranks + tokens + group, eight.to(tl.int16), mask=group < stop // GROUP)
            # Any 8 would do for counting: these a thread has, where it loads four at once.
            any_eight = tl.min(tl.reshape(four, [2, BLOCK // GROUP]), 0)
            counts += tl.histogram(_bin(any_eight), 256)
        own = _number_of_set() * tl.num_programs(0) + tl.program_id(0)
        tl.store(coarse + own * 256 + bins, counts)


@triton.jit
def _window(
    coarse: tl.tensor, rank_chunks: tl.tensor, wanted: tl.tensor, CHUNKS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """All tokens with ranks below the first result are chosen, none from the second on."""
    chunk, bins = tl.arange(0, CHUNKS)[:, None], tl.arange(0, 256)
    place = (_number_of_set() * rank_chunks + chunk) * 256 + bins[None, :]
    groups = tl.cumsum(tl.sum(tl.load(coarse + place, mask=chunk < rank_chunks, other=0), 0), 0)
    low = tl.max(tl.where(groups * GROUP < wanted, _edge(bins + 1), 0), 0)
    high = tl.max(tl.where(groups < wanted, _edge(bins + 2), ONSET.value + 32), 0)
    return low, high


@triton.jit
def _below(word: tl.tensor, NTH: tl.constexpr, high: tl.tensor) -> tl.tensor:
    """Whether the nth of the four ranks in an int64 is below this one."""
    return ((word >> (16 * NTH)).to(tl.int32) & NEVER) < high


@triton.jit
def _rank_of(ranks: tl.tensor, token: tl.tensor, there: tl.tensor) -> tl.tensor:
    return tl.load(ranks + token, mask=there, other=-1).to(tl.int32) & NEVER


@triton.jit(do_not_specialize=["rank_chunks"])
def _collect(
    lanes: tl.tensor,
    coarse: tl.tensor,
    fine: tl.tensor,
    windows: tl.tensor,
    listings: tl.tensor,
    rank_chunks: tl.tensor,
    CHUNKS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Tokens of one chunk that may be chosen, one behind the other, and the histogram of their ranks.

    What one thread stores another loads, after a barrier and past the first cache."""
    request = tl.program_id(2)
    tokens = number(lanes, request, TOKENS)
    listing = listings + (_number_of_set() * tl.num_programs(0) + tl.program_id(0)) * 3
    if tokens == 0:
        tl.store(listing + 1, 0)
    else:
        low, high = _window(coarse, rank_chunks, number(lanes, request, WANTED), CHUNKS)
        words = _own_words(lanes, tokens)
        start, stop = _chunk(tokens)
        groups = (words + tokens // 32 * 9).to(tl.pointer_type(tl.int32)) + start // GROUP
        found = 0
        for at in range(start // 32, stop // 32, BLOCK):
            place = at + tl.arange(0, BLOCK)
            best = tl.load(words + tokens // 4 + place, mask=place < stop // 32, other=-1)
            good = tl.zeros([BLOCK], dtype=tl.int32)
            for nth in tl.static_range(4):
                good += _below(best, nth, high).to(tl.int32)
            own = groups + found + tl.cumsum(good, 0) - good
            for nth in tl.static_range(4):
                below = _below(best, nth, high)
                tl.store(own, place * 4 + nth, mask=below)
                own += below.to(tl.int32)
            found += tl.sum(good, 0)
        tl.debug_barrier()

        kept = 0
        for at in range(0, found, BLOCK):
            place = at + tl.arange(0, BLOCK)
            group = tl.load(groups + place, mask=place < found, other=0, cache_modifier=".cg")
            good = tl.zeros([BLOCK], dtype=tl.int32)
            for half in tl.static_range(2):
                word = tl.load(words + group * 2 + half, mask=place < found, other=-1)
                for nth in tl.static_range(4):
                    good += _below(word, nth, high).to(tl.int32)
            kept += tl.sum(good, 0)
        # Lists of chunks come in any order; the next kernel finds that of tokens again.
        begin = tl.atomic_add(windows + _number_of_set() * 3, kept, sem="relaxed")
        listed = _own_list(lanes, tokens, HEADS) + begin
        done = 0
        for at in range(0, found, BLOCK):
            place = at + tl.arange(0, BLOCK)
            group = tl.load(groups + place, mask=place < found, other=0, cache_modifier=".cg")
            word = tl.load(words + group * 2, mask=place < found, other=-1)
            second = tl.load(words + group * 2 + 1, mask=place < found, other=-1)
            good = tl.zeros([BLOCK], dtype=tl.int32)
            for nth in tl.static_range(4):
                good += _below(word, nth, high).to(tl.int32) + _below(second, nth, high).to(tl.int32)
            own = listed + done + tl.cumsum(good, 0) - good
            for half in tl.static_range(2):
                for nth in tl.static_range(4):
                    below = _below(word, nth, high)
                    tl.store(own, group * GROUP + half * 4 + nth, mask=below)
                    own += below.to(tl.int32)
                word = second
            done += tl.sum(good, 0)
        tl.debug_barrier()

        fine += _number_of_set() * BINS
        halvings = _halvings(high - low)
        ranks = _own_ranks(lanes, tokens)
        sure = 0
        for at in range(0, kept, BLOCK):
            place = at + tl.arange(0, BLOCK)
            token = tl.load(listed + place, mask=place < kept, other=0, cache_modifier=".cg")
            rank = _rank_of(ranks, token, place < kept)
            open = (place < kept) & (rank >= low)
            tl.atomic_add(fine + ((rank - low) >> halvings), 1, mask=open, sem="relaxed")
            sure += tl.sum((rank < low).to(tl.int32), 0)
        tl.store(listing, begin)
        tl.store(listing + 1, kept)
        tl.store(listing + 2, sure)
        if tl.program_id(0) == 0:
            tl.store(windows + _number_of_set() * 3 + 1, low)
            tl.store(windows + _number_of_set() * 3 + 2, high)


@triton.jit
def take(
    sure: tl.tensor, tie: tl.tensor, sure_before: tl.tensor, ties_before: tl.tensor, ties_wanted: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Which of one turn are taken, all sure ones and the first ties, and their places among all taken. sure,
    tie: int32 of 0 and 1. ..._before: how many there were in earlier turns."""
    # One running sum counts both: no turn has 65,536 of them. As many ties are taken as are left, so places
    # follow from the two counts.
    counts = tl.cumsum(sure + (tie << 16), 0)
    ties = ties_before + (counts >> 16)
    taken = (sure == 1) | ((tie == 1) & (ties <= ties_wanted))
    return taken, sure_before + (counts & 0xFFFF) + tl.minimum(ties, ties_wanted) - 1


@triton.jit
def _decide(
    lanes: tl.tensor,
    fine: tl.tensor,
    windows: tl.tensor,
    listings: tl.tensor,
    CHUNKS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The chosen tokens of one chunk, behind those of the chunks before it."""
    request = tl.program_id(2)
    listings += _number_of_set() * tl.num_programs(0) * 3
    kept = tl.load(listings + tl.program_id(0) * 3 + 1)
    if kept > 0:
        tokens, count = number(lanes, request, TOKENS), number(lanes, request, WANTED)
        window = windows + _number_of_set() * 3
        total, low, high = tl.load(window), tl.load(window + 1), tl.load(window + 2)
        chunk, bins = tl.arange(0, CHUNKS), tl.arange(0, BINS)
        each_sure = tl.load(listings + chunk * 3 + 2, mask=chunk < tl.num_programs(0), other=0)
        counts = tl.load(fine + _number_of_set() * BINS + bins)
        bin, ties_wanted = _limit(counts, count - tl.sum(each_sure, 0))
        halvings = _halvings(high - low)
        limit = low + (bin << halvings)

        listed, ranks = _own_list(lanes, tokens, HEADS), _own_ranks(lanes, tokens)
        if halvings > 0:  # up to 16 ranks share the limit's bin
            each = tl.zeros([256], dtype=tl.int32)
            for at in range(0, total, BLOCK):
                place = at + tl.arange(0, BLOCK)
                token = tl.load(listed + place, mask=place < total, other=0)
                above = _rank_of(ranks, token, place < total) - limit
                there = (place < total) & (above >= 0) & (above < (1 << halvings))
                each += tl.histogram(above & 255, 256, mask=there)
            within, ties_wanted = _limit(each, ties_wanted)
            limit += within

        start, _ = _chunk(tokens)
        sure_earlier, ties_earlier = tl.zeros([BLOCK], dtype=tl.int32), tl.zeros([BLOCK], dtype=tl.int32)
        if start > 0:
            for at in range(0, total, BLOCK):
                place = at + tl.arange(0, BLOCK)
                token = tl.load(listed + place, mask=place < total, other=tokens)
                rank = _rank_of(ranks, token, token < start)
                sure_earlier += (rank < limit).to(tl.int32)
                ties_earlier += (rank == limit).to(tl.int32)
        sure_before, ties_before = tl.sum(sure_earlier, 0), tl.sum(ties_earlier, 0)

        listed += tl.load(listings + tl.program_id(0) * 3)
        chosen = memory(lanes, request, CHOSEN, tl.int32) + tl.program_id(1) * count
        for at in range(0, kept, BLOCK):
            place = at + tl.arange(0, BLOCK)
            token = tl.load(listed + place, mask=place < kept, other=0)
            rank = _rank_of(ranks, token, place < kept)
            sure, tie = (rank < limit).to(tl.int32), (rank == limit).to(tl.int32)
            taken, at_place = take(sure, tie, sure_before, ties_before, ties_wanted)
            tl.store(chosen + at_place, token, mask=taken)
            sure_before += tl.sum(sure, 0)
            ties_before += tl.sum(tie, 0)


def select_tokens(
    lanes: Tensor,
    partial_lse: Tensor,
    sets: int,
    *,
    first: int = 0,
    block_tokens: int = UNIT.value,
    chunks: int | None = None,
) -> None:
    """Choose the tokens that matter most to any query head of a set.

    lanes: int64 [B, fields]; reads scores, and uses their memory up; writes keys (scratch) and chosen
    partial_lse: float32 [B, Hq, parts], as `score_landmarks` returns it
    sets: S, a divisor of Hq
    first: tokens at the start of every request that are not to be chosen (sinks)
    block_tokens: per turn of a program, a divisor of 2048
    chunks: programs per request and set, at most 32; by default so many that the device is full
    Twin: aquifer.kernels.landmarks.select_tokens, up to the rounding of ranks.
    """
    requests, num_q_heads, parts = partial_lse.shape
    expect("lanes", lanes, (requests, FIELDS.value), torch.int64)
    expect("partial_lse", partial_lse, (None, None, None), torch.float32)
    expect_power_of_two("block_tokens", block_tokens, 128, UNIT.value)
    if parts > MAX_PARTS:
        raise ValueError(f"{parts} parts of a log-sum-exp; at most {MAX_PARTS} can be read")
    if num_q_heads % sets:
        raise ValueError(f"{num_q_heads} query heads do not divide into {sets} sets")
    heads = num_q_heads // sets
    rows = triton.next_power_of_2(heads)
    rank_chunks = chunks or max(1, min(MAX_CHUNKS, PROGRAMS // (requests * sets)))
    chunks = chunks or max(1, min(MAX_CHUNKS, PROGRAMS // 2 // (requests * sets)))

    def scratch(*shape: int) -> Tensor:
        return torch.empty(requests, sets, *shape, dtype=torch.int32, device=lanes.device)

    coarse, fine = scratch(rank_chunks, 256), scratch(BINS.value)
    windows = scratch(3)  # length of the list, and the ranks between which the limit lies
    listings = scratch(chunks, 3)  # of a chunk: where its list begins, how long it is, how many are sure
    _rank[(rank_chunks, sets, requests)](
        lanes,
        partial_lse.contiguous(),
        coarse,
        fine,
        windows,
        first,
        parts,
        HEADS=heads,
        ROWS=rows,
        PARTS=MAX_PARTS,
        BLOCK=max(128, block_tokens * 4 // max(4, rows)),  # as many scores for any set
        num_warps=8,
    )
    grid = (chunks, sets, requests)
    sizes = {"CHUNKS": MAX_CHUNKS, "HEADS": heads}
    _collect[grid](
        lanes, coarse, fine, windows, listings, rank_chunks, **sizes, BLOCK=block_tokens // 8, num_warps=4
    )
    _decide[grid](lanes, fine, windows, listings, **sizes, BLOCK=block_tokens // 2, num_warps=8)
