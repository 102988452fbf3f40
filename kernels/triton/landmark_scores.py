"""Scores of packed landmarks by tensor cores, whose operands are found in shared memory.

A byte of a landmark is one point of the 4-d grid: four channels, which in int8 are one register of a tensor
core's operand. So one look-up decodes four channels for all query heads, and nothing is rearranged: a lane
loads the codes that it will look up, and the queries are taken in the order in which lanes hold their codes.
Queries have two bytes per channel, a coarse and a fine one, side by side as columns of the other operand:
four query heads fill it.

The points lie in shared memory 32 times, once per bank, and a lane reads its own copy: no two lanes ever meet
in a bank, whatever the codes are. With one copy, the busiest bank would be asked by 3.5 of 32 lanes.

Bytes moved, per layer and request: codes and scales once, H * T * (D/4 + 2), and 4 * Hq * T for the scores.
The limit is memory. Written in Gluon, as Triton has no way to say which lane a value is in.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from aquifer.kernels.triton.lanes import INDEX_PAGES, PAGE, SCORES, TOKENS, memory, number

FINE = gl.constexpr(254)
"""Steps of a query's second byte in one of the first."""

NOTHING = gl.constexpr(-(2.0**100))
"""Score of a token that does not count: finite, so that it can be subtracted from itself, and a power of two,
so that it has no rounding error when it is multiplied and subtracted in one operation."""

WARPS = gl.constexpr(8)
EACH = gl.constexpr(4)
"""Tokens of a lane, one after the other; four lanes share them, so that 8 warps have a page."""

LOG2E = gl.constexpr(1.4426950408889634)

POINTS_AT = gl.constexpr(
    """{
    .shared .align 128 .b8 aquifer_points[32768];
    mov.u32 $0, aquifer_points;
    }"""
)
PUT_FOUR_TIMES = gl.constexpr(
    """
    st.shared.v4.b32 [$1], {$2, $2, $2, $2};
    mov.u32 $0, 0;
    """
)
# What comes out is part of every address, so that no look-up comes before the barrier.
WAIT_FOR_POINTS = gl.constexpr(
    """{
    .reg .u32 lane;
    bar.sync 0;
    mov.u32 lane, %laneid;
    shl.b32 $0, lane, 2;
    }"""
)
# Or the assembler puts off what was asked for ahead of time until it is wanted.
ASK_NOW = gl.constexpr("bar.warp.sync -1; mov.u32 $0, 0;")


@gluon.constexpr_function
def _rows(own: int) -> gl.DistributedLinearLayout:
    """Layout of [64, EACH, 4 * own]: four lanes share a token, and each has `own` columns side by side."""
    columns = [[0, 0, 1 << bit] for bit in range(own.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[*columns, [0, 1, 0], [0, 2, 0]],
        lane_bases=[[0, 0, own], [0, 0, 2 * own], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[8, 0, 0], [16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[8 * WARPS.value, EACH.value, 4 * own],
    )


@gluon.jit
def _places(LAST: gl.constexpr, LAYOUT: gl.constexpr) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """Coordinates in [64, EACH, LAST]; the first two make a token of a page."""
    line = gl.arange(0, 8 * WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    each = gl.arange(0, EACH, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    last = gl.arange(0, LAST, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    return line[:, None, None], each[None, :, None], last[None, None, :]


@gluon.jit
def _page(pages: gl.tensor, token: gl.tensor, tokens: gl.tensor) -> gl.tensor:
    """Page of the index that a token is in."""
    return gl.load(pages + token // PAGE, mask=token < tokens, other=0).to(gl.int64)


@gluon.jit
def _put_points(words: gl.tensor) -> gl.tensor:
    """Write 32 copies of every point to shared memory. Returns the address of the first."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [WARPS, 1], [1, 0])
    point = gl.arange(0, 256, layout=gl.SliceLayout(1, layout))[:, None]
    four_copies = gl.arange(0, 8, layout=gl.SliceLayout(0, layout))[None, :]
    word = gl.load(words + point)
    base = gl.inline_asm_elementwise(POINTS_AT.value, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    put = [base + point * 128 + four_copies * 16, word]
    gl.inline_asm_elementwise(PUT_FOUR_TIMES.value, "=r,r,r", put, dtype=gl.int32, is_pure=False, pack=1)
    return base


@gluon.jit
def _look_up(code: gl.tensor, base: gl.tensor, lane: gl.tensor, LAYOUT: gl.constexpr) -> gl.tensor:
    """int8 [256, D], an operand: tokens in the order of its rows, channels as `_query_bytes` takes them.

    code: int32 [64, EACH, D/16], four codes each, in layout _rows(D/64)
    lane: four times the lane's number"""
    OWN: gl.constexpr = code.shape[2] // 4
    WORDS: gl.constexpr = code.shape[2] * 4
    code = code.reshape([WARPS, 8, 2, 2, 4, OWN]).permute([2, 0, 3, 1, 5, 4]).reshape([PAGE, OWN, 4])
    first, second = ((code << 7) & 0x7F80) | lane, ((code >> 1) & 0x7F80) | lane
    third, last = ((code >> 9) & 0x7F80) | lane, ((code >> 17) & 0x7F80) | lane
    place = gl.join(gl.join(first, second), gl.join(third, last)) + base
    place = place.permute([0, 1, 4, 3, 2]).reshape([PAGE, WORDS])
    # A register of the operand is four channels, so its address is there four times.
    place = gl.join(gl.join(place, place), gl.join(place, place)).reshape([PAGE, 4 * WORDS])
    place = gl.convert_layout(place, LAYOUT, assert_trivial=True)
    return gl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r,r,r,r", [place], dtype=gl.int8, is_pure=True, pack=4
    )


@gluon.jit
def _query_bytes(coarse_fine: gl.tensor, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr) -> gl.tensor:
    """int8 [D, 8], the other operand: of four lanes that share a token each has D/4 channels side by side."""
    place = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(1, LAYOUT))
    word = place // 4
    channel = ((word % 4) * (HEAD_DIM // 16) + word // 4) * 4 + place % 4
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, LAYOUT))
    return gl.load(coarse_fine + column[None, :] * HEAD_DIM + channel[:, None])


@gluon.jit
def score_pages(
    coarse_fine: gl.tensor,
    steps: gl.tensor,
    words: gl.tensor,
    codes: gl.tensor,
    scales: gl.tensor,
    lanes: gl.tensor,
    partial_lse: gl.tensor,
    first: gl.tensor,
    CODE_STRIDE: gl.constexpr,
    SCALE_STRIDE: gl.constexpr,
    GROUP: gl.constexpr,
    FOURTHS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
) -> None:
    """Four query heads of one KV head of one request: every so many-th page. There are (H * FOURTHS, parts,
    requests) programs: those that read the same lines of codes run side by side.

    coarse_fine: int8 [B, H * FOURTHS, 8, D], rows 2i and 2i+1 of query head i
    steps: float32 [B, Hq], what one of all that is multiplied and added is worth in a score
    words: int32 [256], points in four int8
    codes: int32 [slots, H*D/16], four in each; scales: float16 [slots, H]; strides in elements
    partial_lse: float32 [B, Hq, parts]
    Twin: aquifer.kernels.triton.landmarks._score.
    """
    OWN: gl.constexpr = HEAD_DIM // 64
    CODES: gl.constexpr = _rows(OWN)
    MEMBERS: gl.constexpr = _rows(1)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    POINTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    QUERIES: gl.constexpr = gl.DotOperandLayout(1, SUMS, 4)
    own, part, request = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    owns, parts = gl.num_programs(0), gl.num_programs(1)
    head, fourth = own // FOURTHS, own % FOURTHS
    tokens = number(lanes, request, TOKENS) // PAGE * PAGE  # as it is: the compiler has to know
    if tokens > 0:
        pages = memory(lanes, request, INDEX_PAGES, gl.int32)
        scores = memory(lanes, request, SCORES, gl.float32)
        at, turn = part * PAGE, parts * PAGE
        page, next_page = _page(pages, at, tokens), _page(pages, at + turn, tokens)

        base = _put_points(words)
        query = _query_bytes(coarse_fine + (request * owns + own) * 8 * HEAD_DIM, HEAD_DIM, QUERIES)
        # Offsets in a page. A lane's tokens differ by constants, which take no registers if added last.
        line, each, word = _places(4 * OWN, CODES)
        code_at, code_each = line * (EACH * CODE_STRIDE) + head * (4 * OWN) + word, each * CODE_STRIDE
        line, each, member = _places(4, MEMBERS)
        scale_at, scale_each = line * (EACH * SCALE_STRIDE) + head, each * SCALE_STRIDE

        own_head, num_q_heads = head * GROUP + 4 * fourth, owns // FOURTHS * GROUP
        there = 4 * fourth + member < GROUP
        step = gl.load(steps + request * num_q_heads + own_head + member, mask=there, other=0.0)
        row_at = (own_head + member).to(gl.int64) * tokens

        # One turn ahead of what is looked up, and the numbers of pages two.
        own_codes, own_scales = codes + page * (PAGE * CODE_STRIDE), scales + page * (PAGE * SCALE_STRIDE)
        code = gl.load(own_codes + code_at + code_each, mask=at < tokens, other=0)
        scale = gl.load(own_scales + scale_at + scale_each, mask=at < tokens, other=0.0)
        lane = gl.inline_asm_elementwise(
            WAIT_FOR_POINTS.value, "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
        zero = gl.full([PAGE, 8], 0, gl.int32, SUMS)
        # Maxima and sums of exponentials lane by lane: they are joined once, at the end.
        top = gl.max(gl.full([8 * WARPS, EACH, 4], NOTHING, gl.float32, MEMBERS), 1)
        total = gl.zeros_like(top)
        for at in range(part * PAGE, tokens, turn):
            after = at + turn
            own_codes = codes + next_page * (PAGE * CODE_STRIDE)
            own_scales = scales + next_page * (PAGE * SCALE_STRIDE)
            next_code = gl.load(own_codes + code_at + code_each, mask=after < tokens, other=0)
            next_scale = gl.load(own_scales + scale_at + scale_each, mask=after < tokens, other=0.0)
            next_page = _page(pages, after + turn, tokens)
            gl.inline_asm_elementwise(ASK_NOW.value, "=r", [], dtype=gl.int32, is_pure=False, pack=1)

            sums = mma_v2(_look_up(code, base, lane, POINTS), query, zero)
            sums = sums.reshape([2, WARPS, 2, 8, 4, 2]).permute([1, 3, 0, 2, 4, 5])
            coarse, fine = gl.split(sums.reshape([8 * WARPS, EACH, 4, 2]))
            whole = gl.convert_layout(coarse * FINE + fine, MEMBERS, assert_trivial=True)
            score = whole.to(gl.float32) * (scale.to(gl.float32) * step)
            token = at + line * EACH + each
            # The scores of a request begin where memory was given out, so four of them are one store.
            gl.store(gl.multiple_of(scores + (row_at + token), [1, 16, 1]), score, mask=there)

            if at < first:
                score = gl.where(token >= first, score, NOTHING)
            above = gl.maximum(top, gl.max(score, 1))
            share = gl.exp2(score * LOG2E - (above * LOG2E)[:, None, :])
            total = total * gl.exp2((top - above) * LOG2E) + gl.sum(share, 1)
            top = above
            code, scale = next_code, next_scale
        highest = gl.max(top, 0)
        lse = highest + gl.log(gl.sum(total * gl.exp2((top - highest[None, :]) * LOG2E), 0))
        member = gl.arange(0, 4, layout=lse.type.layout)
        query_head = request * num_q_heads + own_head + member
        gl.store(partial_lse + query_head * parts + part, lse, mask=4 * fourth + member < GROUP)
