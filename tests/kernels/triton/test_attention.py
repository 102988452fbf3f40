import pytest
import torch
from torch import Tensor

from aquifer.kernels import attention
from aquifer.kernels.attention import attend_ref, merge_attention
from aquifer.kernels.triton.attention import attend_pages, merge_parts

# The interpreter multiplies bfloat16 wrongly, so that one is for devices.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
if torch.cuda.is_available():
    TOLERANCE[torch.bfloat16] = 2e-2
KERNELS = ["_attend_split", "_merge_splits"]


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def int32(rows: object, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)


def expect_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    (out, lse), (expected_out, expected_lse) = found, expected
    assert out.dtype == expected_out.dtype
    torch.testing.assert_close(out, expected_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "group", "head_dim"), [(2, 1, 64), (1, 3, 64), (1, 4, 128)])
def test_pages_of_many_requests_equal_their_twin(
    heads: int, group: int, head_dim: int, dtype: torch.dtype, device: torch.device, launched: list[str]
) -> None:
    pages = [[2], [0], [3], [4, 1], [1, 4, 0]]
    tokens = [1, 7, 255, 257, 700]
    keys = normal(heads, 5 * 256, head_dim, dtype=dtype, device=device)
    values = keys.flip(1)
    q = 2 * normal(5, heads * group, head_dim, dtype=dtype, device=device)
    tables = int32([row + [-1] * (3 - len(row)) for row in pages], device)
    out, lse = attend_pages(q, keys, values, tables, int32(tokens, device), splits=3)
    assert launched == KERNELS
    for request, (own, count) in enumerate(zip(pages, tokens, strict=True)):
        slots = torch.cat([torch.arange(page * 256, page * 256 + 256) for page in own])[:count].to(device)
        expected, expected_lse = attend_ref(q[request, :, None], keys[:, slots], values[:, slots])
        found = out[request, :, None], lse[request, :, None]
        expect_equal(found, (expected, expected_lse), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("group", "queries", "dtype"),
    # In float32 a tile holds one token, however many there are.
    [
        *((3, 5, dtype) for dtype in TOLERANCE),
        *((4, 40, dtype) for dtype in TOLERANCE if dtype.itemsize == 2),
    ],
)
def test_some_tokens_of_each_request_see_as_much_as_each_may(
    group: int, queries: int, dtype: torch.dtype, device: torch.device, launched: list[str]
) -> None:
    """New tokens that see each other causally behind pasts of different lengths; some see nothing."""
    keys = normal(2, 5 * 256, 64, dtype=dtype, device=device)
    values = keys.flip(1)
    tables = int32([[2, 0, -1], [4, 1, 3]], device)
    lengths = int32([*range(230, 230 + queries), *range(500, 498 + queries), 0, 0], device)
    q = 2 * normal(2 * queries, 2 * group, 64, dtype=dtype, device=device)
    found = attend_pages(q, keys, values, tables, lengths, splits=3)
    assert launched == KERNELS
    expect_equal(found, attention.attend_pages(q, keys, values, tables, lengths), TOLERANCE[dtype])


@pytest.mark.parametrize("splits", [None, 1, 2, 99])
def test_any_number_of_splits_gives_the_same(
    splits: int | None, device: torch.device, launched: list[str]
) -> None:
    keys, values = normal(2, 1, 512, 64, dtype=torch.float32, device=device)
    q = normal(1, 2, 64, dtype=torch.float32, device=device)
    found = attend_pages(q, keys, values, int32([[1, 0]], device), int32([300], device), splits=splits)
    slots = torch.cat((torch.arange(256, 512), torch.arange(44))).to(device)
    expected, lse = attend_ref(q[0, :, None], keys[:, slots], values[:, slots])
    expect_equal(found, (expected[None, :, 0], lse[None, :, 0]), TOLERANCE[torch.float32])
    assert launched == KERNELS


def test_a_request_without_tokens_weighs_nothing_when_merged(
    device: torch.device, launched: list[str]
) -> None:
    keys, values = normal(2, 1, 256, 64, dtype=torch.float32, device=device)
    q = normal(1, 2, 64, dtype=torch.float32, device=device)
    table = int32([[0]], device)
    out, lse = attend_pages(q, keys, values, table, int32([0], device))
    assert not out.any() and (lse == -torch.inf).all()
    part = attend_pages(q, keys, values, table, int32([99], device))
    assert launched == 2 * KERNELS
    torch.testing.assert_close(merge_attention([(out, lse), part]), part[0])


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    keys = normal(2, 256, 64, dtype=torch.float32, device=device)
    q = normal(1, 4, 64, dtype=torch.float32, device=device)
    table, length = int32([[0]], device), int32([9], device)
    with pytest.raises(ValueError, match="values is"):
        attend_pages(q, keys, keys.half(), table, length)
    with pytest.raises(ValueError, match="block_tables is"):
        attend_pages(q, keys, keys, table[:, None], length)
    with pytest.raises(ValueError, match="3 query heads"):
        attend_pages(q[:, :3], keys, keys, table, length)
    with pytest.raises(ValueError, match="keys has strides"):
        attend_pages(q, keys[:, ::2], keys[:, ::2], table, length)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("count", "rows"), [(1, 1), (2, 5), (5, 40), (19, 3)])
def test_merged_parts_equal_their_twin(
    count: int, rows: int, dtype: torch.dtype, device: torch.device, launched: list[str]
) -> None:
    """Parts of several layouts, some of which weigh nothing."""
    parts: list[tuple[Tensor, Tensor]] = []
    for number in range(count):
        out = normal(4, rows, 64 + number, dtype=dtype, device=device)[..., :64].contiguous()
        lse = 3 * normal(4, rows + number, dtype=torch.float32, device=device)[:, :rows]
        if number % 3 == 1:
            out = out.transpose(0, 1).contiguous().transpose(0, 1)
            lse[0] = -torch.inf
        parts.append((out, lse))
    out, lse = merge_parts(parts)
    assert out.dtype == dtype and out.transpose(0, 1).is_contiguous()
    wide = torch.stack([part.double() for part, _ in parts])
    weights = torch.stack([own.double() for _, own in parts])
    expected = (weights.softmax(0)[..., None] * wide).sum(0)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), weights.logsumexp(0), atol=1e-5, rtol=1e-5)
    assert set(launched) == {"_merge_parts"}


def test_merging_parts_without_tokens_gives_nothing(device: torch.device, launched: list[str]) -> None:
    nothing = torch.zeros(2, 3, 16, device=device), torch.full((2, 3), -torch.inf, device=device)
    out, lse = merge_parts([nothing, nothing])
    assert not out.any() and (lse == -torch.inf).all()
    assert launched == ["_merge_parts"]
