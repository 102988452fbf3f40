"""Attention over pieces equals attention over the whole, with and without the fused operators."""

from itertools import pairwise

import pytest
import torch

from aquifer.kernels.attention import (
    attend,
    attend_in_pieces,
    attend_pages,
    attend_ref,
    merge_attention,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def random_qkv(
    heads: int, group: int, rows: int, keys: int, dim: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    torch.manual_seed(rows * keys)
    shapes = [(heads * group, rows, dim), (heads, keys, dim), (heads, keys, dim)]
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 777), (5, 64), (33, 257)])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_attend_equals_its_twin(rows: int, keys: int, group: int, dtype: torch.dtype) -> None:
    q, k, v = random_qkv(2, group, rows, keys, 64, dtype)
    out, lse = attend(q, k, v)
    expected, expected_lse = attend_ref(q, k, v)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 2, 63, 300])
def test_causal_attend_equals_its_twin(rows: int, dtype: torch.dtype) -> None:
    q, k, v = random_qkv(2, 3, rows, rows, 64, dtype)
    out, lse = attend(q, k, v, causal=True)
    expected, expected_lse = attend_ref(q, k, v, causal=True)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)


def test_strided_views_of_a_pool_are_read_in_place() -> None:
    q, pool_k, pool_v = random_qkv(2, 2, 3, 1000, 32, torch.float32)
    k, v = pool_k[:, 256:700], pool_v[:, 256:700]
    torch.testing.assert_close(attend(q, k, v)[0], attend_ref(q, k, v)[0], rtol=2e-5, atol=2e-5)


def test_merged_pieces_equal_the_whole() -> None:
    q, k, v = random_qkv(2, 3, 7, 600, 64, torch.float32)
    cuts = [0, 1, 256, 300, 600]
    parts = [attend(q, k[:, a:b], v[:, a:b]) for a, b in pairwise(cuts)]
    torch.testing.assert_close(merge_attention(parts), attend_ref(q, k, v)[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("rows", "keys"), [(7, 5000), (1024, 4096), (1024, 13000), (2048, 300)])
def test_pieces_equal_the_whole_whoever_computes_them(rows: int, keys: int) -> None:
    """On a GPU, chunks of prefill go to cuDNN and small pieces to flash attention."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    q, k, v = random_qkv(2, 2, rows, keys, 64, dtype)
    found = merge_attention(attend_in_pieces(q, k, v))
    torch.testing.assert_close(found, attend_ref(q, k, v)[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [300, 1024])
def test_heads_may_lie_in_the_product_that_made_them(rows: int) -> None:
    """Queries, keys and values as a fused projection leaves them: token by token, side by side."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    torch.manual_seed(rows)
    product = torch.randn(rows, 12, 64, device=DEVICE).to(dtype)
    q, k, v = (part.transpose(0, 1) for part in product.split([8, 2, 2], dim=1))
    expected = attend_ref(q, k, v, causal=True)
    for found, other in zip(attend(q, k, v, causal=True), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.skipif(DEVICE.type != "cuda", reason="cuDNN needs a GPU")
def test_cudnn_sees_keys_in_powers_of_two_only() -> None:
    """It takes long to prepare for each new shape."""
    q, k, v = random_qkv(2, 2, 1024, 20_000, 64, torch.bfloat16)
    assert [out.shape for out, _ in attend_in_pieces(q, k, v)] == [q.shape] * 2  # 16,384 and the rest
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attend_in_pieces(q, k, v)
        attend(q, k[:, :1024], v[:, :1024], causal=True)
    names = [event.name for event in profile.events()]
    assert names.count("aten::_scaled_dot_product_cudnn_attention") == 2
    assert names.count("aten::_scaled_dot_product_flash_attention") == 1


def test_a_past_in_full_and_a_chunk_causally_equal_causal_attention_over_both() -> None:
    q, k, v = random_qkv(2, 2, 500, 500, 32, torch.float32)
    expected, _ = attend_ref(q, k, v, causal=True)
    past, own = slice(0, 180), slice(180, 500)
    parts = [attend(q[:, own], k[:, past], v[:, past]), attend(q[:, own], k[:, own], v[:, own], causal=True)]
    torch.testing.assert_close(merge_attention(parts), expected[:, own], rtol=2e-5, atol=2e-5)


def test_attention_over_pages_equals_attention_over_the_tokens_in_them() -> None:
    q, keys, values = random_qkv(2, 3, 3, 1024, 32, torch.float32)
    pages, lengths = [[2, 0], [3, 1], [1, 0]], [300, 0, 256]
    tables = torch.tensor(pages, dtype=torch.int32, device=DEVICE)
    counts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    out, lse = attend_pages(q.transpose(0, 1), keys, values, tables, counts)
    for request, (own, length) in enumerate(zip(pages, lengths, strict=True)):
        if not length:
            assert not out[request].any() and (lse[request] == -torch.inf).all()
            continue
        for head in range(2):
            slots = torch.cat([torch.arange(256) + 256 * page for page in own])[:length].to(DEVICE)
            queries = q[3 * head : 3 * head + 3, request, None]
            expected, _ = attend_ref(queries, keys[head, None, slots], values[head, None, slots])
            found = out[request, 3 * head : 3 * head + 3, None]
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
